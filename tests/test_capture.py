"""Captures: looking things up, stacking, tables, several forwards, and files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import workbench
from support.tiny import FAMILIES, make
from workbench import Capture, CaptureError, FormatError

GPT2, WHISPER = FAMILIES[0], FAMILIES[-1]
NAMES = ("entropy", "received", "sink", "induction", "top_keys")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make(GPT2)


@pytest.fixture
def capture(model: nn.Module) -> Capture:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(NAMES, z=True) as capture:
        model(**GPT2.inputs())
    return capture


@pytest.fixture(scope="module")
def speech() -> Capture:
    built = make(WHISPER)
    with workbench.attach(built) as wb, torch.no_grad(), wb.capture(["entropy", "distance"]) as capture:
        built(**WHISPER.inputs())
    return capture


def test_looking_up(capture: Capture) -> None:
    site = capture["blocks.1.attn"]
    assert site is capture["transformer.h.1.attn"] is capture[1] is capture[capture.sites[1]]
    assert site.entropy.shape == (2, 4, 17)
    assert site.z is not None
    assert site.z.shape == (2, 17, 4, 8)
    assert "entropy" in dir(site)
    assert len(capture) == 2
    assert [s.site.layer for s in capture] == [0, 1]
    assert "2 sites" in repr(capture)


def test_z_is_the_pattern_times_the_values(model: nn.Module) -> None:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(values=True, z=True) as capture:
        model(**GPT2.inputs())
    for site in capture:
        z = site.pattern.apply(site.pattern.values)
        torch.testing.assert_close(z.transpose(1, 2), site.z, atol=1e-5, rtol=1e-5)


def test_what_was_not_captured_says_so(capture: Capture, speech: Capture) -> None:
    with pytest.raises(CaptureError, match="was not captured"):
        _ = capture[0].peak
    with pytest.raises(CaptureError, match='did you mean "entropy"'):
        _ = capture[0].entropi
    with pytest.raises(CaptureError, match=r"cross"):
        _ = speech["decoder.0.cross_attn"].distance
    assert not hasattr(capture[0], "nothing")
    with pytest.raises(CaptureError, match=r'there is no site "blocks\.7\.attn"'):
        _ = capture["blocks.7.attn"]


def test_stack(capture: Capture, speech: Capture) -> None:
    assert capture.stack("entropy").shape == (2, 2, 4, 17)
    assert speech.stack("entropy", kind="cross").shape == (2, 2, 4, 9)
    with pytest.raises(CaptureError, match=r"different shapes: \[2, 4, 20\] at model.encoder"):
        speech.stack("entropy")
    with pytest.raises(CaptureError, match='kind "crosss"'):
        speech.stack("entropy", kind="crosss")


def test_table(capture: Capture, speech: Capture) -> None:
    frame = capture.table("entropy")
    assert list(frame.columns) == ["forward", "site", "call", "layer", "kind", "batch", "head", "entropy", "n"]
    assert len(frame) == 2 * 2 * 4
    row = frame[(frame.layer == 1) & (frame.batch == 0) & (frame["head"] == 2)].iloc[0]
    assert row.entropy == pytest.approx(capture[1].entropy[0, 2].mean().item(), abs=1e-6)
    assert len(capture.table("received", per="position")) == 2 * 2 * 4 * 17
    assert set(speech.table("distance").kind) == {"self"}
    with pytest.raises(CaptureError, match="no tidy table"):
        capture.table("top_keys_index")


def test_forwards_are_kept_apart_and_pool(model: nn.Module) -> None:
    ids = GPT2.inputs()["input_ids"]
    with workbench.attach(model) as wb, torch.no_grad():
        with wb.capture(NAMES) as both:
            model(ids)
        with wb.capture(NAMES) as apart:
            model(ids[:1])
            model(ids[1:])
            assert len(apart.calls) == 2
    with pytest.raises(CaptureError, match="holds 2 forwards"):
        _ = apart[0]
    pooled = apart.pool()
    torch.testing.assert_close(pooled.stack("entropy"), both.stack("entropy"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apart.calls[1].stack("sink"), both.stack("sink")[:, 1:], atol=1e-5, rtol=1e-5)
    assert sorted(apart.table("entropy").forward.unique()) == [0, 1]


def test_pooling_different_lengths_is_refused(model: nn.Module) -> None:
    ids = GPT2.inputs()["input_ids"]
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture() as capture:
        model(ids)
        model(ids[:, :5])
    with pytest.raises(CaptureError, match="the forwards differ"):
        capture.pool()


def test_only_the_chosen_sites_are_kept(model: nn.Module) -> None:
    with workbench.attach(model) as wb, torch.no_grad():
        for choice in ("blocks.1.attn", 1, lambda s: s.layer == 1, [wb.sites[1]]):
            with wb.capture(sites=choice) as capture:
                model(**GPT2.inputs())
            assert [site.layer for site in capture.sites] == [1]
            assert (capture.silent, capture.unchosen) == ((), (wb.sites[0].name,))
            assert list(capture.ledger.values()) == ["not asked for", 1]


def test_induction_needs_ids(model: nn.Module) -> None:
    embedded = model.transformer.wte(GPT2.inputs()["input_ids"]).detach()
    with workbench.attach(model) as wb, torch.no_grad():
        with pytest.raises(CaptureError, match="needs their ids"), wb.capture(["induction"]):
            model(inputs_embeds=embedded)
        with wb.capture(["induction"], tokens=GPT2.inputs()["input_ids"]) as given:
            model(inputs_embeds=embedded)
        with wb.capture(["induction"]) as found:
            model(**GPT2.inputs())
    torch.testing.assert_close(given.stack("induction"), found.stack("induction"), rtol=0, atol=0, equal_nan=True)


def test_value_weighted(model: nn.Module) -> None:
    with workbench.attach(model) as wb, torch.no_grad(), wb.capture(["value_weighted_peak"], values=True) as capture:
        model(**GPT2.inputs())
    site = capture[0]
    weighted = site.pattern.dense() * site.pattern.values.norm(dim=-1)[:, :, None, :]
    torch.testing.assert_close(site.value_weighted_peak, (weighted / weighted.sum(-1, keepdim=True)).amax(-1))


@pytest.mark.parametrize("pattern", [False, True])
def test_a_file_gives_back_everything(capture: Capture, tmp_path: Path, pattern: bool) -> None:
    path = capture.save(tmp_path / "run.safetensors", pattern=pattern)
    again = workbench.load_capture(path)
    assert again.provenance == capture.provenance
    assert len(again.provenance["weights_sha256"]) == 64
    for old, new in zip(capture, again, strict=True):
        assert old.site == new.site
        assert old.statistics.keys() == new.statistics.keys()
        for name in old.statistics:
            torch.testing.assert_close(old.statistics[name], new.statistics[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(old.z, new.z)
        if pattern:
            torch.testing.assert_close(old.pattern.dense(), new.pattern.dense())
        else:
            with pytest.raises(CaptureError, match="pattern was not kept"):
                _ = new.pattern
    assert list(tmp_path.iterdir()) == [path]


def test_speech_survives_a_file(speech: Capture, tmp_path: Path) -> None:
    again = workbench.load_capture(speech.save(tmp_path / "run.safetensors", pattern=True))
    assert [s.alias for s in again.sites] == [s.alias for s in speech.sites]
    assert torch.equal(again.stack("entropy", kind="cross"), speech.stack("entropy", kind="cross"))


def test_weights_that_changed_have_no_hash() -> None:
    built = make(GPT2)
    with workbench.attach(built) as wb, torch.no_grad():
        with wb.capture() as capture:
            built(**GPT2.inputs())
        built.lm_head.weight.add_(1)
    assert capture.provenance["weights_sha256"] is None


def test_broken_files(capture: Capture, tmp_path: Path) -> None:
    path = capture.save(tmp_path / "run.safetensors")
    data = path.read_bytes()
    with pytest.raises(FormatError, match="no file"):
        workbench.load_capture(tmp_path / "absent")
    for cut in (0, 4, 100, len(data) - 1):
        broken = tmp_path / "cut"
        broken.write_bytes(data[:cut])
        with pytest.raises(FormatError, match="truncated"):
            workbench.load_capture(broken)
    edited = tmp_path / "edited"
    edited.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(FormatError, match="changed after"):
        workbench.load_capture(edited)
    renamed = tmp_path / "renamed"
    renamed.write_bytes(data.replace(b"flash_attention", b"crash_attention", 1))
    with pytest.raises(FormatError, match="changed after"):
        workbench.load_capture(renamed)
    foreign = tmp_path / "foreign"
    save_file({"a": torch.zeros(2)}, foreign, {"format": "pt"})
    with pytest.raises(FormatError, match=r"not a workbench\.capture"):
        workbench.load_capture(foreign)
    text = tmp_path / "text"
    text.write_text(json.dumps({"a": 1}))
    with pytest.raises(FormatError):
        workbench.load_capture(text)


def test_a_missing_folder_is_named(capture: Capture, tmp_path: Path) -> None:
    with pytest.raises(workbench.WorkbenchError, match="there is no folder"):
        capture.save(tmp_path / "no" / "run.safetensors")
