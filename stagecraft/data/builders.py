"""Which function builds the data of a kind of stage."""

from stagecraft.data import comparisons, corpus, prompts, stage_data

_BUILDERS = {
    "language_model": corpus.build,
    "reward": comparisons.rankings,
    "preference": comparisons.pairs,
    "unpaired_preference": comparisons.judgements,
    "policy": prompts.build,
    "group_policy": prompts.groups,
    "online_preference": prompts.build,
    "comparisons": prompts.records,
    "selection": prompts.records,
}


def build(stage, tokenizer, root, config) -> stage_data.StageData:
    """Builds the data of a stage by its kind; see `stage_data.build`."""
    builder = _BUILDERS[stage.kind]
    return stage_data.build(stage, tokenizer, root, config, builder)
