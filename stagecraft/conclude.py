"""Ends a run: measures it, checks its claims, writes its report and shows both."""

from rich.console import Console

from stagecraft import claims, storage, worlds
from stagecraft.anatomy import behaviour, summary
from stagecraft.report import page, terminal


def conclude(run, *, changed: bool, started: float) -> dict[str, dict]:
    """Measures what is finished, writes summary.json, prompt.json and report.html.

    Args:
        run: a `runs.Run`, inside its mesh.
        changed: whether any stage ran; if none did and the files are there, they are
            left alone.
        started: time.perf_counter() when the run began.

    Returns:
        the summary.
    """
    path = run.root / "summary.json"
    before = storage.read_json(path)
    if before and not changed:
        terminal.show_summary(before)
        return before
    prompt = run.config.measure.prompt or _world_prompt(run.config.world.name)
    if prompt and behaviour.speaking_stages(run):
        answers = behaviour.through_stages(run, prompt)
        storage.write_json(
            run.root / "prompt.json", {"prompt": prompt, "answers": answers}
        )
    figures = summary.measure(run, started)
    figures["bounds"] = claims.check(figures, run.config.measure.claims)
    storage.write_json(path, figures)
    page.write(run.root)
    terminal.show_summary(figures)
    Console().print(f"report: {run.root / 'report.html'}", highlight=False)
    return figures


def _world_prompt(world):
    return worlds.get(world).single_prompt if world else ""
