"""Train the small default language model on the Python standard library's own source code.

The text is the ``.py`` files of the interpreter that runs this script; a fixed list of modules (``HELD_OUT``) is kept
out of both the tokenizer's and the model's training and becomes ``heldout.txt``. Training ends with a stage at four
times the sequence length, so that the model is usable up to its 1024 positions.

    python examples/train_default_model.py                   # train, evaluate, write the model folder
    python examples/train_default_model.py --evaluate-only   # recompute the held-out numbers of the shipped model
"""

import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_DIR = Path(__file__).resolve().parent.parent / "lobcq_fx" / "assets" / "default_model"
# Whole files, of varied subject, that no other standard module copies.
HELD_OUT = ("textwrap.py", "shlex.py", "calendar.py", "queue.py", "graphlib.py", "json/encoder.py")
# Other people's packages, test suites, machine-made tables, the interpreter's build settings, a build-time stand-in.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})
SKIPPED_PREFIXES = ("_sysconfigdata", "_bootsubprocess")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 2048
SHORT_LENGTH, LONG_LENGTH = 256, 1024  # tokens a sequence in the two training stages
LONG_SHARE = 0.2  # share of the steps spent on long sequences
TOKENS_PER_STEP = 4096
PEAK_LR, FINAL_LR_RATIO, WARMUP_SHARE = 3e-3, 0.02, 0.04
EVALUATIONS = ((256, 128), (1024, 512))  # (window, stride) in tokens

console = Console()


def read_standard_library() -> tuple[dict[str, str], dict[str, str]]:
    """Return (training, held-out) texts by path relative to the standard library's folder, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    training: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            training[relative.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return training, {name: training.pop(name) for name in HELD_OUT}


def train_tokenizer(texts: dict[str, str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts; a beginning-of-sequence token is added to every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=LONG_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> Tensor:
    """All documents in one int64 tensor [tokens], each as bos, text, eos."""
    backend = tokenizer.backend_tokenizer
    eos = int(tokenizer.convert_tokens_to_ids(EOS))
    return torch.tensor([token for text in texts.values() for token in (*backend.encode(text).ids, eos)])


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The model's shape: about 3.5 million parameters, every width a multiple of 64."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LONG_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(stream: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless int64 batches [TOKENS_PER_STEP / length, length]; each epoch cuts the stream anew and shuffles it."""
    size = TOKENS_PER_STEP // length
    while True:
        start = int(torch.randint(length, (), generator=generator))
        count = (len(stream) - start) // length
        pieces = stream[start : start + count * length].view(count, length)
        for chosen in torch.split(torch.randperm(count, generator=generator), size):
            if len(chosen) == size:
                yield pieces[chosen]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_LR_RATIO of the peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return PEAK_LR * (FINAL_LR_RATIO + (1 - FINAL_LR_RATIO) * cosine)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Tensor, lr: float) -> float:
    """One update on batch [B, T]; returns the loss in nats a token."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Forward and backward in bf16 (master weights stay fp32): twice as fast where the CPU has bf16 units.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def progress_bar() -> Progress:
    """Steps done, training loss, tokens a second, time gone and time left."""
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def train(model: LlamaForCausalLM, stream: Tensor, steps: int, seed: int) -> None:
    """Train in place for `steps` updates on stream [tokens]: short sequences first, long ones at the end."""
    generator = torch.Generator().manual_seed(seed)
    short, long = (batches(stream, length, generator) for length in (SHORT_LENGTH, LONG_LENGTH))
    optimizer = make_optimizer(model)
    model.train()
    began = time.perf_counter()
    with progress_bar() as progress:
        task = progress.add_task("", total=steps, loss=math.nan, rate=0.0)
        for step in range(steps):
            batch = next(short if step < (1 - LONG_SHARE) * steps else long)
            loss = train_step(model, optimizer, batch, learning_rate(step, steps))
            rate = (step + 1) * TOKENS_PER_STEP / (time.perf_counter() - began)
            progress.update(task, advance=1, loss=loss, rate=rate)
            if not console.is_terminal and (step + 1) % 10 == 0:
                left = (steps - step - 1) * TOKENS_PER_STEP / rate
                console.print(f"step {step + 1}/{steps} loss {loss:.3f} {rate:.0f} tokens/s {left:.0f} s left")


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, window: int, stride: int) -> float:
    """Total nats over tokens [N], first one excluded; each token is scored once, in the first window that holds it."""
    total, scored = 0.0, 1
    for start in range(0, len(tokens), stride):
        piece = tokens[start : start + window]
        fresh = start + len(piece) - scored
        logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits[-fresh:], piece[-fresh:], reduction="sum").item()
        scored += fresh
        if scored == len(tokens):
            break
    return total


def unigram_loss(counts: Tensor, tokens: Tensor) -> float:
    """Total nats of tokens [N] under the training counts [vocabulary] plus one, the first token excluded."""
    smoothed = counts.double() + 1
    return float(-(smoothed / smoothed.sum()).log()[tokens[1:]].sum())


def evaluate(folder: Path) -> dict[str, Any]:
    """Held-out numbers of the model stored in `folder`, computed in fp32: perplexity a token and bits a byte."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    counts = torch.tensor(json.loads((folder / "unigram_counts.json").read_text()))
    size, scored = len(text.encode()), len(tokens) - 1

    def numbers(nats: float) -> dict[str, float]:
        return {
            "perplexity_per_token": round(math.exp(nats / scored), 4),
            "bits_per_byte": round(nats / math.log(2) / size, 4),
        }

    return {
        "heldout_bytes": size,
        "heldout_tokens_scored": scored,
        "unigram": numbers(unigram_loss(counts, tokens)),
        "model": [
            {"window": window, "stride": stride, **numbers(held_out_loss(model, tokens, window, stride))}
            for window, stride in EVALUATIONS
        ],
    }


def write_readme(folder: Path, report: dict[str, Any]) -> None:
    """Write the model card from the report's numbers."""
    held, made = report["evaluation"], report["training"]
    rows = [
        f"perplexity {row['perplexity_per_token']:.2f} a token, {row['bits_per_byte']:.3f} bits a byte"
        for row in (*held["model"], held["unigram"])
    ]
    short, long = (f"window {row['window']}, stride {row['stride']}" for row in held["model"])
    names = ", ".join(f"`{name}`" for name in HELD_OUT)
    minutes = f"{made['wall_time_minutes']:.0f} minutes, {made['threads']} CPU thread(s)"
    run = f"{made['steps']} steps of {made['tokens_per_step']} tokens, seed {made['seed']}, {minutes}"
    lines = f"""# Default model

A Llama-architecture language model of {made["parameters"]:,} parameters (bf16), trained for this project so that every
command works offline. It writes text that looks like Python; it is for tests and demonstrations, not for use.

- **Made by** `examples/train_default_model.py` ({run})
  from the source of Python {made["python"]}'s standard library: {made["training_tokens"]:,} training tokens,
  byte-level BPE with {VOCAB_SIZE} tokens.
- **Held out** (`heldout.txt`, unseen by tokenizer and model, {held["heldout_tokens_scored"]:,} tokens):
  {names}.
- **Held-out numbers** ({short}): {rows[0]};
  ({long}): {rows[1]};
  unigram baseline (`unigram_counts.json`, add-one): {rows[2]}.
  Recompute them with `python examples/train_default_model.py --evaluate-only`.
- **Licence**: weights and tokenizer Apache-2.0; `heldout.txt` is Python standard library source, PSF License Version 2
  (`LICENSE-heldout.txt`; Copyright Python Software Foundation), as is the text that the model was trained on.
"""
    (folder / "README.md").write_text(lines, encoding="utf-8")


def train_and_save(folder: Path, steps: int, seed: int, threads: int) -> dict[str, Any]:
    """Build tokenizer and model, train, write everything but the evaluation; returns the facts of the run."""
    training, held_out = read_standard_library()
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    console.print(f"{len(training)} files, {len(stream):,} tokens, {model.num_parameters():,} parameters")
    began = time.perf_counter()
    train(model, stream, steps, seed)
    minutes = (time.perf_counter() - began) / 60
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "heldout.txt").write_text("".join(held_out.values()), encoding="utf-8")
    counts = torch.bincount(stream, minlength=VOCAB_SIZE).tolist()
    (folder / "unigram_counts.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "files": len(training),
        "training_bytes": sum(len(text.encode()) for text in training.values()),
        "training_tokens": len(stream),
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens_per_step": TOKENS_PER_STEP,
        "seed": seed,
        "threads": threads,
        "wall_time_minutes": round(minutes, 2),
    }


def main(
    out: Annotated[Path, typer.Option(help="Model folder to write (or to evaluate).")] = MODEL_DIR,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer updates.")] = 2880,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the data order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    evaluate_only: Annotated[bool, typer.Option("--evaluate-only", help="Only print the held-out numbers.")] = False,
) -> None:
    """Train the default model, or recompute its held-out numbers."""
    torch.set_num_threads(threads)
    if evaluate_only:
        console.print_json(data=evaluate(out))
        return
    report: dict[str, Any] = {"training": train_and_save(out, steps, seed, threads)}
    report["evaluation"] = evaluate(out)
    (out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_readme(out, report)
    console.print_json(data=report)


if __name__ == "__main__":
    typer.run(main)
