"""A small convolutional autoencoder of pooled patterns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

_WIDTHS = (16, 32, 64)
_BATCH = 64
_STEPS = 16  # of an epoch at least: where there are few patterns, batches are smaller
_RATE = 2e-3


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same weights however many threads there are; on such small layers several mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Autoencoder(nn.Module):
    """Three strided convolutions to a latent vector, and back.

    Args:
        size: side of the patterns, a multiple of 8.
        width: of the latent vector.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        side = size // 2 ** len(_WIDTHS)
        ins = (1, *_WIDTHS[:-1])
        down = [nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()) for i, o in zip(ins, _WIDTHS, strict=True)]
        up = [
            nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(o, i, 4, 2, 1))
            for i, o in reversed(list(zip(ins, _WIDTHS, strict=True)))
        ]
        inner = _WIDTHS[-1] * side * side
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(inner, width))
        self.decoder = nn.Sequential(
            nn.Linear(width, inner), nn.Unflatten(1, (_WIDTHS[-1], side, side)), *up, nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, size, size] from the same."""
        decoded: Tensor = self.decoder(self.encoder(x))
        return decoded


def scaled(maps: Tensor) -> Tensor:
    """Patterns [..., size, size] as the autoencoder takes them, [n, 1, size, size]: √ of the weight, at most 1."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float().clamp(min=0).sqrt()
    return flat / flat.amax((-1, -2), keepdim=True).clamp(min=1e-12)


def fit(
    images: Tensor, width: int, epochs: int, seed: int, most: int, progress: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """The weights of an autoencoder trained on images [n, 1, size, size], and the mean loss of every epoch.

    Args:
        seed: of the weights and the order. most: images used in an epoch; of more, others are drawn in each.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(images.shape[-1], width)
    losses = []
    batch_size = max(4, min(_BATCH, min(most, len(images)) // _STEPS))
    with torch.enable_grad(), _one_thread():
        optimizer = torch.optim.Adam(model.parameters(), _RATE)
        for _ in tqdm(range(epochs), desc="autoencoder", disable=not progress, leave=False):
            total, used = 0.0, 0
            for rows in torch.randperm(len(images), generator=random)[:most].split(batch_size):
                batch = images[rows]
                loss = mse_loss(model(batch), batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, used = total + loss.item() * len(rows), used + len(rows)
            losses.append(total / used)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}, losses


def encode(images: Tensor, weights: Mapping[str, Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Latent vectors [n, width], float64, and the squared error of each image's reconstruction, a mean over cells."""
    model = Autoencoder(images.shape[-1], width)
    model.load_state_dict(dict(weights))
    latents, errors = [], []
    with torch.inference_mode(), _one_thread():
        for part in images.split(256):
            latent = model.encoder(part)
            latents.append(latent)
            errors.append((model.decoder(latent) - part).square().mean((1, 2, 3)))
    # Clones: tensors made in inference mode cannot be used in training, and results are for any use.
    return torch.cat(latents).double().clone(), torch.cat(errors).double().clone()
