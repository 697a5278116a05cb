r"""What SFT does is in the last layer, out of proportion to how far that layer moved.

Weights of the SFT model are grafted into the pretrained one, by layer; what is
explained is the divergence on SFT's own answers. A layer's exact Shapley value less its
share of the squared change is 0 where a change is alike useful everywhere. The control
is the first layer: where it does the same, nothing clusters at the end.

[claim]
number = 4
claim = "Fine-tuning acts through the last layers, close to the output"
source = "recalled facts: Nief et al. 2025, arxiv.org/abs/2506.20746"
primary = "excess.last"
effect = 0.15
control = "the first layer does as much beyond its share"
control_primary = "excess.first"
checks = ["excess.divergence > 0.1"]
seconds = 60
"""

from stagecraft import tree
from stagecraft.anatomy import causes, grafts, texts


def measure(base, own):
    """Shapley values of the layers of SFT, less their shares of the squared change."""
    said = texts.of_stage(base, "sft")
    before, after = (base.model(name) for name in ("pretrain", "sft"))
    players = grafts.layer_players(list(tree.named(before)), before.config)
    whole = grafts.attribute(causes.nearness(after, said), before, after, players)
    excess = [
        row["shapley"] - row["norm_share"]
        for player, row in whole["players"].items()
        if player.startswith("layer")
    ]
    ends = {"first": excess[0], "last": excess[-1]}
    return {"excess": ends | {"divergence": -whole["before"]}}
