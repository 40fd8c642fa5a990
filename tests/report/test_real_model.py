"""From a model on its fast kernel to a checked page, with nothing made up on the way."""

from pathlib import Path

import torch
from torch import Tensor, nn

import workbench
from workbench.report import Report, check


class Attention(nn.Module):
    """Causal self-attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        z: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return z.transpose(1, 2).flatten(2)


def test_a_captured_model_becomes_a_page(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), Attention(), Attention()).eval()
    ids = torch.randint(20, (1, 17))
    wb = workbench.attach(model)
    verification = wb.verify(ids)
    with wb.capture(("entropy", "sink", "previous", "peak")) as cap:
        model(ids)
    path = Report("Two layers").add(cap, verification=verification).write(tmp_path / "report.html")
    assert check(path) == []
    page = path.read_text(encoding="utf-8")
    found = [part for part in (">Verified<", "All 2 sites fired", "17 tokens", "weights sha256") if part in page]
    assert len(found) == 4
