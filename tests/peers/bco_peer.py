"""TRL's BCO loss, batch after batch: `python -m tests.peers.bco_peer IN OUT`.

TRL 1.12.0 was the last release with a BCOTrainer. It cannot share a process with the
release the other tests import, so it runs in one of its own, with the folder it was
installed into on PYTHONPATH.
"""

import argparse
import types

import numpy as np
import torch

VERSION = "1.12.0"


def run(policy, reference, labels, beta):
    """What the trainer computes on batches in order, its running mean carried along.

    Args:
        policy, reference: f64[N, B], summed log-probs, a batch a row.
        labels: bool[N, B].
        beta: float.

    Returns:
        {"loss", "delta": [N], "gradient": [N, B]}.
    """
    import trl
    from trl.experimental.bco import bco_trainer

    assert trl.__version__ == VERSION, trl.__version__
    accelerator = types.SimpleNamespace(use_distributed=False)
    self = types.SimpleNamespace(
        beta=beta,
        running=bco_trainer.RunningMoments(accelerator=accelerator),
        match_underlying_distribution=False,
    )
    out = {"loss": [], "delta": [], "gradient": []}
    for p, q, liked in zip(policy, reference, labels, strict=True):
        p, q = torch.tensor(p, requires_grad=True), torch.tensor(q)
        losses, _, _, delta = bco_trainer.BCOTrainer.bco_loss(
            self, p[liked], p[~liked], q[liked], q[~liked], None, None
        )
        losses.nanmean().backward()
        out["loss"].append(losses.nanmean().item())
        out["delta"].append(delta.item())
        out["gradient"].append(p.grad.numpy())
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("given", help="an .npz of the arguments of `run`")
    parser.add_argument("found", help="the .npz to write what it returns to")
    paths = parser.parse_args()
    with np.load(paths.given) as given:
        arrays = dict(given)
    np.savez(paths.found, **run(**arrays | {"beta": float(arrays["beta"])}))


if __name__ == "__main__":
    main()
