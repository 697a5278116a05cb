"""Runs TRL 1.12's own PPO arithmetic on given arrays: `python ppo_by_trl.py IN OUT`.

Two versions of TRL cannot share a process, so `ppo_losses_test` starts this one with
the older beside it on the path. What stands inside the trainer's one long method is
taken out by its first and last line and run as it is.
"""

import inspect
import sys
import textwrap
from types import SimpleNamespace


def cut(source, first, last):
    """The lines of a method from the one that starts with `first` to that of `last`."""
    lines = source.splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().startswith(first)]
    begin = starts[0]
    ends = [i for i, line in enumerate(lines) if line.strip().startswith(last)]
    end = next(i for i in ends if i >= begin)
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def functions(ppo, torch, given):
    """The named functions on their cases."""
    from trl.experimental.utils import first_true_indices

    x, mask = torch.tensor(given["x"]), torch.tensor(given["x_mask"])
    found = {
        "mean": ppo.masked_mean(x, mask),
        "mean_rows": ppo.masked_mean(x, mask, axis=1),
        "var": ppo.masked_var(x, mask),
        "var_biased": ppo.masked_var(x, mask, unbiased=False),
        "whiten": ppo.masked_whiten(x, mask),
        "whiten_kept": ppo.masked_whiten(x, mask, shift_mean=False),
    }
    raw = torch.tensor(given["raw"])
    stop, pad = int(given["stop"]), int(given["pad"])
    return found | {
        "first_stop": first_true_indices(raw == stop),
        "truncated": ppo.truncate_response(stop, pad, raw),
    }


def judge(ppo, source, torch, given):
    """A rollout's rewards, advantages and returns."""
    names = ("logprobs", "ref_logprobs", "values", "scores", "postprocessed_responses")
    scope = vars(ppo) | {name: torch.tensor(given[name]) for name in names}
    responses = scope["postprocessed_responses"]
    pad = int(given["pad"])
    scope["sequence_lengths"] = ppo.first_true_indices(responses == pad) - 1
    scope["responses"] = responses
    settings = {k[5:]: v.item() for k, v in given.items() if k.startswith("args_")}
    settings["kl_estimator"] = str(given["kl_estimator"])
    scope["args"] = SimpleNamespace(**settings)
    scope["self"] = SimpleNamespace(
        args=scope["args"],
        processing_class=SimpleNamespace(eos_token_id=int(given["stop"])),
    )
    exec(cut(source, "contain_eos_token =", "advantages = torch.masked_fill"), scope)
    wanted = "padding_mask padding_mask_p1 kl rewards advantages returns values scores"
    return {name: scope[name] for name in wanted.split()}, scope


def losses(source, torch, given, scope):
    """Policy and value losses of one micro-batch, and gradients in what is trained."""
    new = torch.tensor(given["new_logprobs"], requires_grad=True)
    vpred = torch.tensor(given["vpred"], requires_grad=True)
    invalid = scope["INVALID_LOGPROB"]
    scope |= {
        "new_logprobs": torch.masked_fill(new, scope["padding_mask"], invalid),
        "vpred": torch.masked_fill(vpred, scope["padding_mask_p1"], 0),
        "mb_values": scope["values"],
        "mb_return": scope["returns"],
        "mb_advantage": scope["advantages"],
        "mb_logprobs": scope["logprobs"],
        "micro_batch_inds": slice(None),
    }
    exec(cut(source, "vpredclipped =", "loss = pg_loss"), scope)
    scope["loss"].backward()
    shares = cut(source, "pg_clipfrac =", "approxkl =")
    lines = [line for line in shares.splitlines() if "logits" not in line]
    exec("\n".join(lines), scope)
    wanted = "pg_loss vf_loss loss pg_clipfrac vf_clipfrac approxkl ratio"
    found = {name: scope[name] for name in wanted.split()}
    return found | {"d_logprobs": new.grad, "d_values": vpred.grad}


def main(source_file, target_file):
    import numpy as np
    import torch
    import trl
    from trl.experimental.ppo import ppo_trainer as ppo

    source = inspect.getsource(ppo.PPOTrainer.train)
    cases = np.load(source_file)
    given = {}
    for key in cases.files:
        case, _, name = key.partition("/")
        given.setdefault(case, {})[name] = cases[key]
    out = {"version": trl.__version__}
    out |= {
        f"functions/{k}": v
        for k, v in functions(ppo, torch, given.pop("functions")).items()
    }
    for case, arrays in given.items():
        found, scope = judge(ppo, source, torch, arrays)
        found |= losses(source, torch, arrays, scope)
        out |= {f"{case}/{k}": v for k, v in found.items()}
    np.savez(target_file, **{k: _numpy(v) for k, v in out.items()})


def _numpy(value):
    return value.detach().numpy() if hasattr(value, "detach") else value


if __name__ == "__main__":
    main(*sys.argv[1:])
