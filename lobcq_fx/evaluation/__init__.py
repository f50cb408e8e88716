"""How good a quantized model still is: of language models perplexity, distance from the float model's predictions,
multiple choice and last words; of encoders the similarity of embeddings. docs/evaluation.md says what each means."""

from lobcq_fx.evaluation.continuations import leading_bos
from lobcq_fx.evaluation.data_files import last_word_texts, questions, sentence_pairs
from lobcq_fx.evaluation.divergence import DivergenceResult, divergence, divergence_of_sequences
from lobcq_fx.evaluation.last_word import LastWordResult, last_word
from lobcq_fx.evaluation.multiple_choice import MultipleChoiceResult, Question, multiple_choice, same_choices
from lobcq_fx.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_sequences
from lobcq_fx.evaluation.similarity import SimilarityResult, cosine_similarity, mean_pooled, sentence_embeddings
from lobcq_fx.evaluation.sts import SentencePair, StsResult, sentences_of, spearman, sts
from lobcq_fx.evaluation.with_cache import WithLobcqCache

__all__ = [
    "DivergenceResult",
    "LastWordResult",
    "MultipleChoiceResult",
    "PerplexityResult",
    "Question",
    "SentencePair",
    "SimilarityResult",
    "StsResult",
    "WithLobcqCache",
    "cosine_similarity",
    "divergence",
    "divergence_of_sequences",
    "last_word",
    "last_word_texts",
    "leading_bos",
    "mean_pooled",
    "multiple_choice",
    "perplexity",
    "perplexity_of_sequences",
    "questions",
    "same_choices",
    "sentence_embeddings",
    "sentence_pairs",
    "sentences_of",
    "spearman",
    "sts",
]
