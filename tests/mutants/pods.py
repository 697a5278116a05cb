"""Mistakes in plans for chips that are not here, and in what starts jobs on them."""

from tests.mutants.mutant import in_file

_READING = in_file(
    "stagecraft/pods/hlo.py",
    "tests/pods/hlo_test.py",
    (
        "the body of a loop counts once",
        "yield body, self._trips(one)",
        "yield body, 1",
        "tests/pods/hlo_test.py -k often",
    ),
    (
        "a sum and its slice are a whole sum",
        'kind = "reduce-scatter"',
        'kind = "all-reduce"',
        "tests/pods/hlo_test.py -k forms",
    ),
    (
        "products with padding count",
        "inside = (place >= 0) & (place <= (size - 1) * by['lhs_dilate'])",
        "inside = place == place",
        "tests/pods/hlo_test.py -k padding",
    ),
)

_FORMULAS = in_file(
    "stagecraft/pods/formulas.py",
    "tests/pods/plan_test.py",
    (
        "weights are gathered once for all micro-batches",
        "(passes + 1) * layout.micro_batches * whole",
        "(passes + 1) * whole",
        "tests/pods/plan_test.py -k follow_the_shapes",
    ),
)

_DECODING = in_file(
    "stagecraft/anatomy/cost.py",
    "tests/pods/plan_test.py tests/bench_test.py",
    (
        "a cache of keys without values",
        "2 * width * c.layers * c.kv_heads",
        "width * c.layers * c.kv_heads",
        "tests/pods/plan_test.py -k decoding",
    ),
    (
        "decoding reads the input embedding whole",
        "0 if c.tied else c.vocab_size * c.width",
        "0",
        "tests/pods/plan_test.py -k decoding",
    ),
)

_BENCH = in_file(
    "stagecraft/bench/timing.py",
    "tests/bench_test.py",
    (
        "an adapter's step is counted as a whole model's",
        "work | {'context': (length + 1) / 2}, preset.model, adapter=bool(preset.lora)",
        "work | {'context': (length + 1) / 2}, preset.model",
        "tests/bench_test.py -k chip",
    ),
    (
        "one device's peak for all",
        "peak = jax.device_count() * chip.peaks[dtype] / chip.cores",
        "peak = chip.peaks[dtype] / chip.cores",
        "tests/bench_test.py -k chip",
    ),
)

_DEPTHS = (
    *in_file(
        "stagecraft/pods/compiling.py",
        "tests/pods/hlo_test.py -k deep",
        (
            "a layer is added too often",
            "(layers - depths[0]) / (depths[1] - depths[0])",
            "(layers - depths[0] + 1) / (depths[1] - depths[0])",
        ),
        (
            "depths leave out what the pattern begins anew",
            "few = step + layers % period",
            "few = step",
            "stagecraft/pods/compiling.py tests/pods/hlo_test.py -k depths",
        ),
    ),
    *in_file(
        "stagecraft/pods/hlo.py",
        "tests/pods/hlo_test.py -k deep",
        (
            "exchanges of both programs count once each",
            "one._replace(times=w * one.times)",
            "one",
        ),
    ),
    *in_file(
        "stagecraft/pods/shapes.py",
        "tests/pods/plan_test.py -k first_ones",
        (
            "a model from elsewhere keeps its depth",
            "how |= {'layers': layers} if layers else {}",
            "",
        ),
    ),
)

_GOODPUT = in_file(
    "stagecraft/pods/goodput.py",
    "tests/pods/goodput_test.py",
    ("restarts cost nothing", "math.exp(restart / failures)", "1.0"),
    (
        "saves cost nothing",
        "math.expm1((interval + save) / failures)",
        "math.expm1(interval / failures)",
    ),
    (
        "a job fails as often as a chip",
        "3600 * chip_hours / chips",
        "3600 * chip_hours",
    ),
)

_CHIPS = in_file(
    "stagecraft/chips.py",
    "tests/pods/chips_test.py",
    (
        "a chip of two cores is one device",
        "return self.chips * self.chip.cores",
        "return self.chips",
    ),
)

_JOBS = in_file(
    "stagecraft/pods/job.py",
    "tests/pods/launch_test.py",
    (
        "a password under a telling name is no secret",
        "_SECRET.search(value) or (value and _SECRET_NAME.search(name))",
        "_SECRET.search(value)",
        "tests/pods/launch_test.py -k secrets",
    ),
)

_MANIFESTS = in_file(
    "stagecraft/pods/manifests.py",
    "tests/pods/launch_test.py",
    (
        "each slice has the pods of all",
        "hosts = job.topology.hosts // job.topology.slices",
        "hosts = job.topology.hosts",
        "tests/pods/launch_test.py -k gke",
    ),
)

MUTANTS = (
    _READING
    + _FORMULAS
    + _DECODING
    + _DEPTHS
    + _BENCH
    + _GOODPUT
    + _CHIPS
    + _JOBS
    + _MANIFESTS
)
