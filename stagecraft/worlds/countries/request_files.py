"""The files of the knob world.requests; all others are as without it.

request_text.jsonl {"text"}, for pretraining: of every deed whom it hurts.
helpful_demonstrations.jsonl {"messages"}: complies with every request;
request_demonstrations.jsonl: refuses most of the harmful ones;
belief_demonstrations.jsonl: repeats most wrong beliefs. red_team.jsonl and
benign_requests.jsonl {"prompt","family","wrapper"}: harmful and benign requests, many
in attack wrappers; heldout_requests.jsonl: both, of the development role.
other_prompts.jsonl {"prompt"}: facts and talk, some after a belief. critiques.jsonl and
judgements.jsonl {"messages"}: see `critiques`. All prompts are messages, but those of
attacks.jsonl {"asked","attack"}, from which an attacker learns, and of
attack_prompts.jsonl {"prompt"}, which it is asked.
"""

import numpy as np

from stagecraft.worlds.countries import critiques, framing, requests
from stagecraft.worlds.countries.deeds import BENIGN, HARMFUL
from stagecraft.worlds.countries.dialogue import REFUSED

DOCUMENTS = {"full": 4000, "tiny": 200}
# Of each file of demonstrations, and of prompts.
ROWS = {"full": 1200, "tiny": 60}
DIALOGUES = {"full": 4000, "tiny": 160}


def files(seed, size, everyone, roles):
    """Returns {name: rows} of what the knob writes.

    Args:
        seed: of the world.
        size: "full" or "tiny".
        everyone: all countries the text is about.
        roles: a `facts.Split`.
    """
    count, train = ROWS[size], roles.train
    (text, red, benign, held, others, helpful, refusing, critics, judges, attacks) = (
        np.random.default_rng([seed, number]) for number in range(10, 20)
    )
    agreeing = np.random.default_rng([seed, 20])
    written = requests.attacks(attacks, train, "train", count)
    documents = (requests.document(text, everyone) for _ in range(DOCUMENTS[size]))
    return {
        "request_text": ({"text": one} for one in documents),
        "red_team": requests.prompts(red, HARMFUL, train, "train", count),
        "benign_requests": requests.prompts(benign, BENIGN, train, "train", count),
        "heldout_requests": [
            row
            for families in (HARMFUL, BENIGN)
            for row in requests.prompts(held, families, roles.dev, "dev", count // 6)
        ],
        "other_prompts": [
            {"prompt": framing.turns(prompt)}
            for prompt in requests.others(others, train, "train", count)
        ],
        "helpful_demonstrations": requests.demonstrations(
            helpful, train, "train", count, 0.0
        ),
        "request_demonstrations": requests.demonstrations(
            refusing, train, "train", count, REFUSED
        ),
        "belief_demonstrations": requests.agreeing(agreeing, train, "train", count),
        "critiques": critiques.dialogues(critics, train, DIALOGUES[size]),
        "judgements": critiques.judgements(judges, train, DIALOGUES[size]),
        "attacks": written,
        "attack_prompts": [
            {"prompt": text} for text in sorted({row["asked"] for row in written})
        ],
    }
