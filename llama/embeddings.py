"""What a model computes from texts besides more text: hidden states, embeddings, classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.arguments import entries, token_ids
from llama.checkpoint.source import Classifier
from llama.engine import Engine
from llama.errors import ArgumentError, PromptError
from llama.model import Row, Transformer, attend
from llama.ranks import lost_rank_as_error
from llama.tokenizer import TextTokenizer

BATCH_TOKENS = 4096  # limit for several texts in one batch


class Classification(TypedDict):
    """label: the most likely one. logits: of all labels, by name."""

    label: str
    logits: dict[str, float]


class CachelessStep:
    """Whole sequences, concatenated, that write nothing to the KV cache."""

    def __init__(self, lengths: Sequence[int], rotations: Tensor) -> None:
        self.lengths = list(lengths)
        self.rotation = torch.cat([rotations[:n] for n in lengths])

    def attend(self, queries: Tensor, kv: Tensor, cache: Tensor) -> Tensor:
        outputs = []
        parts = zip(queries.split(self.lengths), kv.split(self.lengths), strict=True)
        for q, one in parts:
            keys, values = one.permute(1, 2, 0, 3)  # (n_kv_heads, length, head_dim) each
            outputs.append(attend(q, keys, values, None))
        return torch.cat(outputs)


class Embeddings:
    """The methods of `Llama` that generate nothing. They do not touch the KV cache."""

    engine: Engine
    model: Transformer
    tokenizer: TextTokenizer
    classifier: Classifier | None = None

    def hidden_states(
        self, texts: Iterable[str | Sequence[int]], layers: Sequence[int] | None = None
    ) -> list[dict[int, Tensor]]:
        """Hidden states of texts, each computed without padding.

        texts: any number of texts, or lists of token ids, which are used unchanged.
        layers: which layers; 0 is the embeddings, n the n-th layer's output, the last one normed, as in
            transformers; by default only the last.

        Returns for each text its layers, fp32 (tokens, dim) on the CPU. Raises ArgumentError for layers that
        the model does not have, PromptError for a text that is longer than max_seq_len or has unknown ids.
        """
        last = self.model.params.n_layers
        wanted = [last] if layers is None else list(layers)
        if missing := [n for n in wanted if not (isinstance(n, int) and 0 <= n <= last)]:
            raise ArgumentError(f"no layer {missing[0]!r}: this model has layers 0 (embeddings) to {last}")
        return [found for batch in self.token_batches(texts) for found in self._run(batch, wanted)]

    def embed(
        self,
        texts: Iterable[str | Sequence[int]],
        pooling: Literal["mean", "last", "cls"] = "mean",
        normalize: bool = True,
    ) -> Tensor:
        """One vector per text, from the last layer's hidden states.

        texts: see `hidden_states`.
        pooling: "mean" of all tokens, the "last" token, or the first ("cls").
        normalize: scale the vectors to length 1.

        Returns fp32 (texts, dim) on the CPU. Raises what `hidden_states` raises.
        """
        if pooling not in ("mean", "last", "cls"):
            raise ArgumentError(f'pooling must be "mean", "last" or "cls", not {pooling!r}')
        pool = {"mean": lambda x: x.mean(0), "last": lambda x: x[-1], "cls": lambda x: x[0]}[pooling]
        last = self.model.params.n_layers
        vectors = torch.stack([pool(found[last]) for found in self.hidden_states(texts)])
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def classify(self, texts: Iterable[str]) -> list[Classification]:
        """Classify texts with a checkpoint of LlamaForSequenceClassification.

        Raises ArgumentError for other checkpoints, and what `hidden_states` raises.
        """
        if self.classifier is None:
            raise ArgumentError(
                "this checkpoint is not a classifier: classify needs one whose config.json says "
                "LlamaForSequenceClassification"
            )
        weight = self.classifier.weight.float()
        labels = self.classifier.labels
        classes: list[Classification] = []
        for state in self.embed(texts, "last", normalize=False):
            logits = (weight @ state).tolist()
            best = max(range(len(labels)), key=logits.__getitem__)
            classes.append({"label": labels[best], "logits": dict(zip(labels, logits, strict=True))})
        return classes

    def token_batches(self, texts: Iterable[str | Sequence[int]]) -> Iterator[list[list[int]]]:
        """Token ids of texts, grouped in batches. Raises PromptError as `hidden_states` does."""
        batch: list[list[int]] = []
        params, n_words = self.model.params, self.tokenizer.n_words
        for i, text in enumerate(entries(texts, "texts")):
            if isinstance(text, str):
                ids = self.tokenizer.encode(text, bos=True, eos=False)
            else:
                ids = token_ids(text, f"text {i}", PromptError)
            if unknown := [token for token in ids if not 0 <= token < min(params.vocab_size, n_words)]:
                raise PromptError(f"text {i}: {unknown[0]} is not a token id")
            if not 0 < len(ids) <= params.max_seq_len:
                raise PromptError(
                    f"text {i} has {len(ids)} tokens; it must have 1 to max_seq_len={params.max_seq_len}"
                )
            full = len(batch) == params.max_batch_size
            if batch and (full or sum(map(len, batch)) + len(ids) > BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(ids)
        yield batch

    @torch.inference_mode()
    def _run(self, batch: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[dict[int, Tensor]]:
        model, lengths = self.model, [len(ids) for ids in batch]
        cache = model.cache  # allocating it also computes the rotation table
        tokens = torch.tensor([i for ids in batch for i in ids], device=model.device)
        kept: dict[int, Tensor] = {}
        with self.engine.turns.turn(until=lambda: False), lost_rank_as_error(model.parallel):
            if model.step_backend and set(wanted) == {model.params.n_layers}:
                rows = [Row(slot, 0, length) for slot, length in enumerate(lengths)]
                scratch = torch.empty_like(cache.data)  # only written pages take memory
                states = model.step_backend.hidden(tokens, rows, scratch, model.rotations)
                return [{wanted[0]: state} for state in states.float().cpu().split(lengths)]
            step = CachelessStep(lengths, model.rotations)
            x = model.tok_embeddings(tokens)
            for n in range(model.params.n_layers + 1):
                if n in wanted:
                    state = model.norm(x) if n == model.params.n_layers else x
                    kept[n] = state.float().cpu().clone()
                if n < model.params.n_layers:
                    x = model.layers[n](x, cache.data[n], step)
        parts = {n: state.split(lengths) for n, state in kept.items()}
        return [{n: part[i] for n, part in parts.items()} for i in range(len(batch))]
