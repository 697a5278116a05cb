"""Embedded worlds: everything a whole training graph needs, written from a seed.

A world is a module with these functions; text goes in, records and numbers come out,
and no model is known here:

    check(config)                           refuses what the keys `world` cannot be
    write(folder, seed, size, digits, requests, style, teaching, entities, composing)
                                            the files its stages read
    gold(prompt, answer, ended)             a strict score that no stage trains on
    rate(prompt, answers, rng)              a noisy rater of pairs, for comparisons
    attacked(prompt, answer)                whether an attack asks for harm, gets an
                                            answer, and one of use
    sycophantic(prompt, answer)             whether an answer repeats a wrong belief of
                                            the asker, None where a prompt holds none
    revise(prompt, answer, rng)             the harmless answer, where a world has such
    revision_figures(prompts, answers, critiques)  figures of revised answers, likewise
    split(seed, size, entities)             which entities are held out
    probes                                  held-out questions and their figures:
        PROBES                              (function, formats, entities): what is asked
                                            of a stage's model; a function of (language,
                                            entities) returns the figure of its name, or
                                            a dict of figures; entities are
                                            "heldout" or "train"
        OF_KNOBS                (knob, function, formats), asked likewise where that
                                knob of the world is on; a function of (language,
                                held-out entities, role) returns a dict of figures, and
                                one of what each is a share of
        heldout_prompts(seed, entities, split)
        sample_figures(prompts, answers)    of sampled answers: a dict of figures
        win_rate, pair_order                of two answers to each prompt; the latter
                                            is None where all are ties
    single_prompt                           the one shown through every stage
"""

from stagecraft import storage
from stagecraft.errors import UserError
from stagecraft.worlds import countries
from stagecraft.worlds import junk as faults

WORLDS = {"countries": countries}


def get(name):
    """Returns the module of a world."""
    if name not in WORLDS:
        raise UserError(f"world.name={name!r}: there are {', '.join(WORLDS)}")
    return WORLDS[name]


def split(config):
    """Returns which entities of an experiment's world are held out."""
    world = config.world
    return get(world.name).split(config.seed, world.size, world.entities)


def write(
    name,
    folder,
    seed,
    size,
    junk=0.0,
    digits=0,
    requests=False,
    style=0.0,
    taught=False,
    entities=0,
    two_hop=False,
):
    """Writes a world's files; the folder appears whole or not at all.

    Args:
        name: one of `WORLDS`.
        folder: where to.
        seed, size: of the world.
        junk: share of each kind of fault to plant in its text; see `junk.write`.
        digits: of the operands of its sums; 0 for none.
        requests: whether to write requests in families, attacks, beliefs, critiques.
        style: share of demonstrations about facts that open with one pleasantry.
        taught: whether to write what demonstrations may teach: facts of all, false and
            invented ones.
        entities: how many; 0 for as many as the world's size has.
        two_hop: whether to write text that composes two facts, and questions about it.
    """
    knobs = digits, requests, style, taught, entities, two_hop
    with storage.new_folder(folder) as temporary:
        get(name).write(temporary, seed, size, *knobs)
        if junk:
            faults.write(temporary, junk, seed)
