"""What a run stands on: its world, its curated text, its tokenizer, each made once."""

from stagecraft import experiment, processes, runs, storage, worlds
from stagecraft.anatomy import behaviour
from stagecraft.curate import config as curate_config
from stagecraft.curate import curation
from stagecraft.data import stage_data
from stagecraft.errors import UserError
from stagecraft.lineage import Lineage
from stagecraft.models import locate
from stagecraft.report import curation as curation_page
from stagecraft.runs import Run
from stagecraft.text import tokenizer as tokenizers


def read(run: Run) -> None:
    """Writes the world, curates text, and sets the run's tokenizer, each where due."""

    def make():
        _write_world(run.config, run.root)
        _curate(run.config, run.root)
        return tokenizer(run.config, run.root)

    run.tokenizer = processes.in_turn(make, "groundwork")
    if prompt := single_prompt(run.config):
        behaviour.check_prompt(run, prompt)


def _write_world(config, root):
    if not config.world.name or (root / "world").exists():
        return
    world, folder = config.world, root / "world"
    worlds.write(
        world.name,
        folder,
        config.seed,
        world.size,
        junk=world.junk,
        digits=world.sums,
        requests=world.requests,
        style=world.style,
        taught=world.taught,
        entities=world.entities,
        two_hop=world.two_hop,
    )


def _curate(config, root):
    """Curates text into WORKDIR/curation and writes its page, once."""
    out = root / "curation"
    if not config.curation or out.exists():
        return
    c = curate_config.resolve(config.curation.to_dict() | {"out": str(out)})
    c.quality.good, c.quality.bad, c.contamination.files, c.files = (
        stage_data.locate(spec, root)
        for spec in (c.quality.good, c.quality.bad, c.contamination.files, c.files)
    )
    curation.curate(c)
    curation_page.write(out)


def tokenizer(config, root):
    """Returns the run's own tokenizer, kept in WORKDIR/tokenizer from then on."""
    folder, path = root / runs.TOKENIZER, config.tokenizer.path
    if folder.exists():
        tokenizer = own_tokenizer(root)
        for name in tokenizer.files:  # a template's moment, in an older run
            if not (folder / name).exists():
                storage.write_bytes(folder / name, tokenizer.files[name])
        return tokenizer
    if path:
        try:
            tokenizer = tokenizers.load(path)
        except UserError as error:
            raise UserError(f"tokenizer.path: {error}") from None
    elif config.tokenizer.files:
        if config.tokenizer.template:
            raise UserError(tokenizers.NO_TEMPLATE)
        texts = stage_data.texts(config.tokenizer.files, root)
        path = folder / tokenizers.FILE
        return tokenizers.SentencePiece.train(texts, config.tokenizer.vocab_size, path)
    elif experiment.outside(config):
        # With a model comes the tokenizer it was trained with.
        source = locate.locate(experiment.outside(config)[0])
        tokenizer = tokenizers.load(source.tokenizer())
    else:
        raise UserError("tokenizer: set tokenizer.path or tokenizer.files")
    if config.tokenizer.template:
        tokenizer = tokenizers.with_template(tokenizer, config.tokenizer.template)
    tokenizers.keep(tokenizer, folder)
    return tokenizer


def own_tokenizer(root):
    """Reads WORKDIR/tokenizer, if it is still the one its stages were trained with."""
    folder = root / runs.TOKENIZER
    tokenizer = tokenizers.load(folder)
    for name, entry in Lineage.read(root).stages.items():
        if entry.tokenizer not in (None, tokenizer.digest):
            raise UserError(
                f"{folder}: is not the tokenizer that {name} was trained with (a file "
                "is missing, or was changed); copy the whole folder"
            )
    return tokenizer


def check_vocabulary(roles, tokenizer):
    """Refuses a model with fewer rows in its embedding than the tokenizer has ids."""
    for role, model in roles.items():
        rows = getattr(model, "body", model).config.vocab_size
        if rows < tokenizer.vocab_size:
            raise UserError(
                f"{role}_from: its model embeds {rows} ids, but the tokenizer has "
                f"{tokenizer.vocab_size}; use the tokenizer it was trained with "
                "(tokenizer.path)"
            )


def single_prompt(config):
    """Returns the prompt that all stages answer at the end, "" for none."""
    world = config.world.name if asks_world(config) else ""
    return config.measure.prompt or (world and worlds.get(world).single_prompt)


def asks_world(config):
    """Returns whether figures are the world's, not of stages' own held-out prompts."""
    return bool(config.world.name) and config.measure.probes
