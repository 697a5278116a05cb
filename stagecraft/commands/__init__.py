"""What each command does, and the flags it takes. Each is a Python call too."""

from stagecraft.commands import models, pages, pods, running, weights

COMMANDS = {
    "run": running.run_,
    "data": running.data,
    "graph": running.graph,
    "status": running.status,
    "list": running.list_,
    "new": running.new,
    "prompt": models.prompt,
    "chat": models.chat,
    "serve": models.serve,
    "label": models.label,
    "report": pages.report_,
    "compare": pages.compare_,
    "anatomy": weights.anatomy,
    "eval": models.eval_,
    "judge": models.judge,
    "claims": running.claims,
    "refusals": models.refusals,
    "curate": running.curate,
    "bench": running.bench_,
    "plan": pods.plan,
    "launch": pods.launch,
    "import": models.import_,
    "export": models.export,
}
