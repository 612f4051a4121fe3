"""One process: Muon in a training loop of your own.

python examples/one_process.py
"""

import torch
from torch import nn

import spectral_dist


class Model(nn.Module):
    """Predicts the next of 64 tokens from the last one and where it stands."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
                for _ in range(2)
            )
        )
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next tokens."""
        return self.head(self.blocks(self.embed(tokens)))


def batch(step: int, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and what follows them: t -> 5 t + 3 mod 64, three times of four."""
    generator = torch.Generator().manual_seed(step)
    tokens, others = torch.randint(64, (2, rows, 16), generator=generator)
    is_ruled = torch.rand(rows, 16, generator=generator) < 0.75
    return tokens, torch.where(is_ruled, (5 * tokens + 3) % 64, others)


def main() -> None:
    """Train, and print losses."""
    torch.manual_seed(0)
    model = Model()
    # matrices go to Muon; embedding, head and biases to AdamW, in the same optimizer
    groups = spectral_dist.param_groups(model)
    optimizer = spectral_dist.Muon(groups, lr=0.02, scalar_lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for step in range(60):
        tokens, targets = batch(step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
