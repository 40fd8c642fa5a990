"""zarr, xarray, pandas and polars open a store as it is."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers as hf

import workbench
from support.tiny import SPECIAL, VOCABULARY
from workbench import Capture

polars = pytest.importorskip("polars")
xarray = pytest.importorskip("xarray")
zarr = pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Capture]:
    """A store of an encoder-decoder on inputs of two lengths, and their capture in memory."""
    torch.manual_seed(0)
    config = hf.BartConfig(
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3, d_model=24,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=VOCABULARY, decoder_start_token_id=3, **SPECIAL,
    )  # fmt: skip
    model = hf.BartModel(config).eval()
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    inputs = [
        {"input_ids": torch.randint(5, 40, (2, n)), "decoder_input_ids": torch.randint(5, 40, (2, 4))}
        for n in (5, 7, 5)
    ]
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(["entropy", "received", "top_keys"], z=True) as plain:
            for one in inputs:
                model(**one)
        with wb.capture(["entropy", "received", "top_keys"], z=True, store=path):
            for one in inputs:
                model(**one)
    return path, plain


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """They have nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_xarray(both: tuple[Path, Capture]) -> None:
    path, plain = both
    tree = xarray.open_datatree(path, engine="zarr", chunks=None)
    assert {"/shape-0/encoder-self", "/shape-0/decoder-cross", "/shape-1/decoder-self"} <= set(tree.groups)
    for shape, forwards in (("shape-0", [0, 2]), ("shape-1", [1])):
        for family in ("encoder-self", "decoder-self", "decoder-cross"):
            alone = xarray.open_zarr(path, group=f"{shape}/{family}", chunks=None)
            assert alone.identical(tree[f"{shape}/{family}"].to_dataset())
            assert alone.forward.values.tolist() == forwards
            assert alone.entropy.dims == ("forward", "site", "batch", "head", "query")
            for row, forward in enumerate(forwards):
                for name in alone.site.values.tolist():
                    own = plain.calls[forward][name]
                    there = alone.sel(site=name, forward=forward)
                    assert (there.entropy.values == own.entropy.numpy()).all()
                    assert (there.z.values == own.z.numpy()).all()
                    assert (there.top_keys_index.sel(head=1).values == own.top_keys_index[:, 1].numpy()).all()
                    assert (alone["pattern.k" if "pattern.k" in alone else "k"][row].sel(site=name).values
                            == own.pattern.k.numpy()).all()  # fmt: skip


def test_zarr(both: tuple[Path, Capture]) -> None:
    path, plain = both
    group = zarr.open_group(path, mode="r")
    assert group.attrs["format"] == "workbench.store"
    entropy = group["shape-0/encoder-self/entropy"]
    assert entropy.chunks == (1, 1, 2, 1, 5)
    assert entropy.shape == (2, 2, 2, 3, 5)
    first = plain.calls[2].sites[0]
    assert (entropy[1, 0] == plain.calls[2][first].entropy.numpy()).all()
    alone = zarr.open_array(path / "shape-1" / "tokens" / "input", mode="r")
    assert (alone[0] == plain.forwards[1].ids["input"].numpy()).all()
    file = next((path / "shape-0" / "encoder-self" / "entropy").glob("c.0.*"))
    raw = bytearray(file.read_bytes())
    raw[0] ^= 1
    whole = file.read_bytes()
    try:
        file.write_bytes(raw)
        with pytest.raises(ValueError, match="checksum"):
            entropy[0, 0, :, 0]
        assert (entropy[0, 0, :, 1] == plain.calls[0][first].entropy[:, 1].numpy()).all()
    finally:
        file.write_bytes(whole)


def test_pandas_and_polars(both: tuple[Path, Capture]) -> None:
    path, plain = both
    heads = pd.read_parquet(path / "tables" / "heads")
    for name in ("entropy", "received"):
        table = plain.table(name)
        keys = ["forward", "site", "call", "layer", "kind", "batch", "head"]
        assert (
            heads[[*keys, name]]
            .astype({"site": str, "kind": str})
            .equals(table[[*keys, name]].astype({"site": str, "kind": str}))
        )
    lazily = polars.scan_parquet(path / "tables" / "heads" / "*.parquet")
    mean = lazily.group_by("layer").agg(polars.col("entropy").mean()).sort("layer").collect()
    assert mean["entropy"].to_list() == pytest.approx(plain.table("entropy").groupby("layer").entropy.mean().tolist())
    tokens = polars.read_parquet(path / "tables" / "tokens" / "*.parquet")
    assert tokens.filter(polars.col("forward") == 1, polars.col("stream") == "decoder")["id"].to_list() == (
        plain.forwards[1].ids["decoder"].flatten().tolist()
    )
