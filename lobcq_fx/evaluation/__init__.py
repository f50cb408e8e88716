"""How good a quantized model still is: perplexity of language models, similarity of encoders' embeddings."""

from lobcq_fx.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_sequences
from lobcq_fx.evaluation.similarity import SimilarityResult, cosine_similarity, mean_pooled, sentence_embeddings

__all__ = [
    "PerplexityResult",
    "SimilarityResult",
    "cosine_similarity",
    "mean_pooled",
    "perplexity",
    "perplexity_of_sequences",
    "sentence_embeddings",
]
