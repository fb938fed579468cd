"""Prompt embeddings: the empty one read from a file or computed once and cached, others on demand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.errors import ModelError
from ddengine.models.cache import cache_dir, combined_digest, file_digest, write_to_cache
from ddengine.models.files import find_weights, read_json, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

EMPTY_EMBEDDING = "empty_embedding"  # name of the file and of the tensor in it


class TextEncoder:
    """CLIP's text half of a diffusers folder; in memory only while a prompt is being encoded."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `text_encoder/` and `tokenizer/`; loads nothing; `ModelError` if one is missing."""
        self.folder = folder
        self.weights = find_weights(folder / "text_encoder", "model")
        self.width: int = read_json(folder / "text_encoder" / "config.json").get("hidden_size", 512)
        tokenizer = [folder / "tokenizer" / name for name in ("vocab.json", "merges.txt", "tokenizer.json")]
        self._tokenizer_files = [path for path in tokenizer if path.is_file()]
        if not self._tokenizer_files:
            raise ModelError(f"{folder / 'tokenizer' / 'vocab.json'}: not found; point to a folder with its tokenizer")
        self._known: dict[str, Tensor] = {}

    @property
    def digest(self) -> str:
        """sha256 over the encoder's weights, its config and the tokenizer."""
        files = [self.weights, self.folder / "text_encoder" / "config.json", *self._tokenizer_files]
        return combined_digest((path.name, file_digest(path)) for path in files)

    def encode(self, prompt: str) -> Tensor:
        """A prompt's last hidden state, padded or cut to 77 tokens: [1, 77, D] float32 on the CPU."""
        if prompt not in self._known:
            if len(self._known) >= 16:
                self._known.clear()
            self._known[prompt] = self._encode(prompt)
        return self._known[prompt]

    def empty(self) -> Tensor:
        """`encode("")`, kept in the user's cache under the encoder's digest."""
        name = f"empty-embedding/{self.digest}.safetensors"
        path = cache_dir() / name
        if path.is_file():
            try:
                return read_embedding(path, self.width)
            except ModelError as error:
                log.info("computing the empty prompt again: %s", error)
        embedding = self.encode("")
        write_to_cache(name, embedding_bytes(embedding))
        return embedding

    def _encode(self, prompt: str) -> Tensor:
        import torch

        tokenizer, encoder = self._load()
        limit = 77
        tokens = tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            log.warning("the prompt has %d tokens, only the first %d are used", length, limit)
        with torch.no_grad():
            return encoder(tokens.input_ids).last_hidden_state.to(torch.float32)

    def _load(self) -> tuple[Any, Any]:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging as hf_logging

        # float32 whatever the model runs in: once per prompt, and the embedding steers every later pass
        variant = "fp16" if self.weights.name.endswith(".fp16.safetensors") else None
        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
            loaded: Any = CLIPTextModel.from_pretrained(
                self.folder / "text_encoder",
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                output_loading_info=True,
            )
        except Exception as error:  # whatever the library says about a broken folder
            raise ModelError(
                f"{self.folder / 'text_encoder'}: cannot be loaded ({error}); fetch the folder again"
            ) from error
        finally:
            if bars:
                hf_logging.enable_progress_bar()
        encoder, report = loaded
        if report["missing_keys"] or report["mismatched_keys"]:
            wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[:4]
            raise ModelError(
                f"{self.weights}: the weights do not fit the text encoder: {wrong}; fetch the folder again"
            )
        return tokenizer, encoder.float().requires_grad_(False).eval()


def read_embedding(path: Path, width: int) -> Tensor:
    """A prompt embedding [1, n, `width`] float32 from a file with the one tensor `empty_embedding`."""
    import torch

    tensors, _ = read_tensors(path)
    if set(tensors) != {EMPTY_EMBEDDING}:
        raise ModelError(
            f"{path}: holds {sorted(tensors)[:4]}, expected the one tensor {EMPTY_EMBEDDING!r}; write the file again"
        )
    value = tensors[EMPTY_EMBEDDING].to(torch.float32, copy=True)
    if value.dim() != 3 or value.shape[0] != 1 or value.shape[1] < 1 or value.shape[2] != width:
        raise ModelError(
            f"{path}: {EMPTY_EMBEDDING} is {list(value.shape)}, expected [1, n, {width}]; use this model's own file"
        )
    if not torch.isfinite(value).all():
        raise ModelError(f"{path}: {EMPTY_EMBEDDING} holds values that are not finite; write the file again")
    return value


def embedding_bytes(embedding: Tensor) -> bytes:
    """A prompt embedding [1, n, D] as the bytes of the file `read_embedding` reads."""
    from safetensors.torch import save

    return save({EMPTY_EMBEDDING: embedding.detach().cpu().contiguous()})
