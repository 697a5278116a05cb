"""Mistakes between files and batches."""

from tests.mutants.mutant import in_file

_PACKING = in_file(
    "stagecraft/data/packing.py",
    "tests/data/packing_test.py",
    (
        "packing takes the shortest first",
        'np.argsort(-sizes, kind="stable")',
        'np.argsort(sizes, kind="stable")',
    ),
    ("packing takes the emptiest row", "room = rooms[at]\n", "room = rooms[-1]\n"),
    (
        "bfd keeps the overflow",
        'if strategy == "bfd_split":',
        'if strategy in ("bfd", "bfd_split"):',
    ),
    (
        "wrapped loses the last row",
        "rows = -(-total // length)",
        "rows = total // length",
    ),
    (
        "positions do not restart",
        "stream - np.repeat(np.cumsum(sizes) - sizes, sizes)",
        "np.broadcast_to(np.arange(length), real.shape)[real]",
    ),
    (
        "one segment a row",
        "np.repeat(numbers + 1, sizes)",
        "np.repeat(0 * numbers + 1, sizes)",
    ),
    (
        "prompts padded on the right",
        "ids[i, length - len(row) :] = row\nmask[i, length - len(row) :] = True",
        "ids[i, : len(row)] = row\nmask[i, : len(row)] = True",
    ),
)

_STAGE_DATA = (
    *in_file(
        "stagecraft/data/comparisons.py",
        "tests/data/comparisons_test.py tests/data/stage_data_test.py",
        (
            "chosen and rejected are swapped",
            "sequences += every",
            "sequences += [pair[::-1] for pair in every]",
        ),
        (
            "labels inverted",
            'rendered.numbers("label")[rendered.firsts] > 0',
            'rendered.numbers("label")[rendered.firsts] == 0',
        ),
        (
            "held-out rows have training indices",
            "arrays = numbered(heldout, length, len(train.records))",
            "arrays = numbered(heldout, length, 0)",
        ),
    ),
    *in_file(
        "stagecraft/data/conversations.py",
        "tests/data/conversations_test.py",
        (
            "earlier turns are compared",
            "turns=self.turns",
            'turns="all"',
            "tests/data/comparisons_test.py tests/data/stage_data_test.py",
        ),
        ("the moment is not in the key", "sorted(tokenizer.files.items())", "()"),
        ("turns are not in the key", '"turns": turns,', ""),
        ("the files are not in the key", '"content": files.digest(paths),', ""),
        ("fields are not in the key", '"fields": mapping or {},', ""),
        (
            "the cache counts nothing",
            'counts.add(settings["reading"], paths)',
            "",
        ),
        (
            "the cache does not say what was recognised",
            "readers.say(counts.recognised[begun:])",
            "",
        ),
        (
            "an absent margin is 0",
            "math.nan if value is None else float(value)",
            "float(value or 0)",
            "tests/data/comparisons_test.py",
        ),
        ("records of one prompt differ", "prompt_key(prompt).encode()", "b''"),
    ),
    *in_file(
        "stagecraft/data/documents.py",
        "tests/data/conversations_test.py",
        (
            "masks begin at a byte",
            "bits[start % 8 :][: len(ids)]",
            "bits[: len(ids)]",
        ),
        (
            "a cut counts all targets",
            "np.flatnonzero(self.lengths > length)",
            "np.flatnonzero(self.lengths < 0)",
        ),
    ),
    *in_file(
        "stagecraft/data/answers.py",
        "tests/data/conversations_test.py",
        (
            "pairs too long are cut",
            "return self.where(fit)",
            "return self",
            "tests/data/comparisons_test.py tests/data/stage_data_test.py",
        ),
        (
            "index counts from the first row",
            "np.asarray(index, np.int32) + np.int32(self.start)",
            "np.asarray(index, np.int32)",
            "tests/data/stage_data_test.py",
        ),
    ),
    *in_file(
        "stagecraft/data/stage_data.py",
        "tests/data/record_mixture_test.py",
        (
            "records of all parts are one source",
            'parts = schema.listed(specs["files"])',
            "",
        ),
        (
            "held-out records are learned",
            "np.array(train, np.int64)",
            "learned",
            "tests/data/cache_test.py tests/data/stage_data_test.py",
        ),
    ),
    *in_file(
        "stagecraft/data/comparisons.py",
        "tests/data/record_mixture_test.py",
        ("the mixture of records is left out", "mixture=mixed", ""),
    ),
    *in_file(
        "stagecraft/data/prompts.py",
        "tests/data/record_mixture_test.py",
        (
            "prompts are mixed a batch of other size",
            "mixed_rows(stage, rendered.sources[train], count, seed)",
            "mixed_rows(stage, rendered.sources[train], 1, seed)",
        ),
        (
            "verifiers find no renamed prompt",
            'record["prompt"] = one.prompt',
            "pass",
        ),
        (
            "oversampling forgotten",
            "stage.batch_size * stage.oversample",
            "stage.batch_size",
            "tests/mutation_gaps_test.py",
        ),
    ),
)

_PIPELINE = in_file(
    "stagecraft/data/dataset.py",
    "tests/data/dataset_test.py",
    ("padding rows have index 0", 'FILL = {"index": -1}', 'FILL = {"index": 0}'),
    (
        "rows in the order of the file",
        "grain.MapDataset.range(_length(rows))\n.seed(seed + i + ahead)\n.shuffle()",
        "grain.MapDataset.range(_length(rows))\n.seed(seed + i + ahead)",
    ),
    (
        "every process takes the first rows",
        "whole[name][some] = value",
        "whole[name][: len(some)] = value",
        "tests/data/order_test.py",
    ),
    (
        "a resume begins one step late",
        'self.step, self._running = state["next_index"], None',
        'self.step, self._running = state["next_index"] + 1, None',
    ),
    (
        "a resume keeps what was read ahead",
        "        self.close()\n"
        '        self.step, self._running = state["next_index"], None',
        '        self.step = state["next_index"]',
    ),
    (
        "workers outlive a killed parent",
        "    process.end_with_parent()\n",
        "",
        "tests/data/order_test.py",
    ),
    (
        "the mixture is left out",
        "if number == 0 and self.mixture:",
        "if number == 1 and self.mixture:",
        "tests/data/order_test.py",
    ),
)

_SOURCES = in_file(
    "stagecraft/data/readers.py",
    "tests/data/readers_test.py",
    (
        "soft labels do not turn a judgement",
        "(first, not first)",
        "(True, False)",
    ),
    (
        "identical pairs are pairs",
        "if len(answers) < 2:",
        "if False:",
        "tests/data/comparisons_test.py -k identical",
    ),
    (
        "an identical pair is judged",
        "if len(_distinct(pair.answers)) < 2:",
        "if not pair.answers:",
        "tests/data/comparisons_test.py -k identical",
    ),
    (
        "identical pairs are not counted",
        'tally.drop("identical", where, identical)',
        "pass",
        "tests/data/comparisons_test.py -k identical",
    ),
)

_LANGUAGE = in_file(
    "stagecraft/data/corpus.py",
    "tests/data/cache_test.py tests/data/stage_data_test.py",
    (
        "text after a row's end is lost",
        '"bfd_split" if data.format == "text" else "bfd"',
        '"bfd"',
    ),
    (
        "rows of several sources",
        "groups = [use[documents.sources[use] == source] for source in range(count)]",
        "",
    ),
)

_MIXTURE = in_file(
    "stagecraft/data/mixture.py",
    "tests/data/order_test.py",
    (
        "a block begins its sources again",
        "segment.before[source] + block * segment.quotas[source] + ranks[at]",
        "segment.before[source] + ranks[at]",
    ),
    (
        "a phase begins its sources again",
        "segment.before[source] + block * segment.quotas[source] + ranks[at]",
        "block * segment.quotas[source] + ranks[at]",
    ),
    (
        "every epoch alike",
        "np.random.default_rng([self.seed, epoch])",
        "np.random.default_rng([self.seed])",
    ),
    (
        "one row more than the cap",
        "segment.start + block * int(segment.quotas.sum()) + at + 1",
        "segment.start + block * int(segment.quotas.sum()) + at + 2",
    ),
    (
        "caps forgotten",
        "[stop for stop in [*stops, end] if stop is not None]",
        "[stop for stop in [end] if stop is not None]",
    ),
    (
        "shares by rows",
        "(step * size, np.array(shares) / one)",
        "(step * size, np.array(shares) / (0 * one + 1))",
        "tests/data/cache_test.py",
    ),
    (
        "a source without rows passes",
        "if any(shares) and not len(rows):",
        "if False:",
        "tests/data/record_mixture_test.py",
    ),
    (
        "caps that end too early pass",
        "found.end < steps * size",
        "found.end < steps",
        "tests/data/record_mixture_test.py",
    ),
    (
        "rows by chance order",
        "(np.arange(n) + u) / n",
        "np.sort(u * np.arange(n) % 1)",
    ),
)

_SHARDS = in_file(
    "stagecraft/data/shards.py",
    "tests/data/shards_test.py",
    (
        "open files are shipped",
        'return {"path": str(self.path)}',
        'return {"path": str(self.path), "all": [self[i] for i in range(len(self))]}',
    ),
    (
        "ids wrap round",
        "if ids.min() < 0 or ids.max() >= self.vocab_size:",
        "if False:",
    ),
    ("contents are not compared", 'if found != told["sha256"]:', "if False:"),
    ("sizes are not compared", 'if size != told["bytes"]:', "if size == -1:"),
    ("any tokenizer will do", "if told != digest:", "if not told:"),
    (
        "the second shard's documents",
        "number -= int(self._ends[shard - 1]) if shard else 0",
        "number -= int(self._ends[0]) if shard else 0",
    ),
    (
        "two bytes are enough for all",
        '"uint16" if vocab_size <= 2**16 else "uint32"',
        '"uint16" if vocab_size < 2**17 else "uint32"',
    ),
)

_CACHE = in_file(
    "stagecraft/data/cache.py",
    "tests/data/cache_test.py",
    (
        "the tokenizer is not in the key",
        '"tokenizer": tokenizer.digest',
        "",
    ),
    ("the content is not in the key", '"content": files.digest(paths),', ""),
    (
        "others at work are cleared away",
        'folder.glob(f".{target.name}.*") if alone else ()',
        'folder.glob(f".{target.name}.*")',
    ),
    ("no lock", "fcntl.flock(handle, fcntl.LOCK_EX)", "pass"),
    (
        "who waited works again",
        "        if (cached := _cached(target, say=True)) is not None:\n"
        "            return cached\n        # What",
        "        # What",
    ),
    (
        "damage goes unseen",
        "shards.Shards(target).verify()\n",
        "shards.Shards(target)\n",
    ),
)

_FORMS = in_file(
    "stagecraft/data/forms.py",
    "tests/data/forms_test.py",
    ("mixed forms pass", "if len(self.counts) == 1:", "if self.counts:"),
    (
        "two forms at once pass",
        "len(keys) > 1",
        "len(keys) > 9",
    ),
    (
        "gpt is a user",
        '("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "assistant"',
        '("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "user"',
    ),
    ("no answer is left", "size = max(least - 1, 0)", "size = least"),
    (
        "the space stays with the prompt",
        'chosen[size - 1] == " "',
        'chosen[size - 1] == "_"',
    ),
    ("a second prompt passes", "if prompt[-len(last) :] != last:", "if False:"),
    (
        "settings of templates are ignored",
        'if record.get("chat_template_kwargs"):',
        "if False:",
    ),
)

_CONTAINERS = in_file(
    "stagecraft/data/containers.py",
    "tests/data/containers_test.py tests/data/readers_test.py",
    (
        "absent keys are null",
        "without_nulls(record) if nulls else record",
        "record",
        "tests/data/odd_records_test.py -k null_is_absent",
    ),
    (
        "other line ends stay",
        r'text[:-2] + "\n" if text.endswith("\r\n") else text',
        "text",
    ),
    (
        "a list's first line is read as a record",
        'first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")',
        'first.removeprefix(codecs.BOM_UTF8).startswith(b"[[")',
    ),
    (
        "lines are numbered one too low",
        "if position - ends[-1][0] >= size and not (blank and line.strip()):\n"
        "    ends.append((position, number + 1))",
        "if position - ends[-1][0] >= size and not (blank and line.strip()):\n"
        "    ends.append((position, number))",
        "tests/curate/reader_test.py",
    ),
    (
        "text is cut at any line",
        "not (blank and line.strip())",
        "not (blank and not line)",
        "tests/curate/reader_test.py",
    ),
    (
        "a BOM stays",
        "line.removeprefix(codecs.BOM_UTF8) if number == 1 else line",
        "line",
        "tests/curate/reader_test.py",
    ),
    (
        "half a surrogate pair passes",
        r'b"\\u" in data and not _encodable(value)',
        "False",
    ),
    (
        "deep JSON ends the run",
        "(ValueError, RecursionError)",
        "ValueError",
        "tests/curate/reader_test.py",
    ),
)

_COLUMNS = in_file(
    "stagecraft/data/columns.py",
    "tests/data/containers_test.py -k utf8",
    (
        "a row that is not UTF-8 takes its neighbours along",
        "if len(batch) > 1:",
        "if False:",
    ),
    ("a row that is not UTF-8 is left out", "return [None]", "return []"),
)

_STREAMS = in_file(
    "stagecraft/data/streams.py",
    "tests/data/containers_test.py tests/data/readers_test.py",
    ("a cut-off file passes", "    if begun:\n", "    if begun is None:\n"),
    (
        "one stream of a file",
        "piece, stream, begun = stream.unused_data, fresh(), False",
        "stream, begun = fresh(), False",
    ),
    (
        "lines end with a piece",
        "            rest.append(last)\n",
        "            rest.append(last)\n            yield rest.pop()\n",
    ),
    (
        "a part begins a byte late",
        "file.seek(start)",
        "file.seek(start + bool(start))",
        "tests/curate/reader_test.py",
    ),
    (
        "a compressed part begins where the one before it does",
        "piece[max(start - passed, 0) : max(end - passed, 0)]",
        "piece[0 : max(end - passed, 0)]",
        "tests/curate/reader_test.py",
    ),
)

_FILES = in_file(
    "stagecraft/data/files.py",
    "tests/data/containers_test.py tests/data/readers_test.py",
    (
        "files by name, not in their own order",
        'return [folder / file["filename"] for file in files]',
        'return sorted(folder / file["filename"] for file in files)',
    ),
    ("the first split is taken", "if len(splits) != 1:", "if not splits:"),
)

_STORAGE = in_file(
    "stagecraft/storage.py",
    "tests/storage_test.py tests/runs_test.py",
    ("half a folder stays", "shutil.rmtree(temporary, ignore_errors=True)", "pass"),
    ("a folder that is there is lost", "old.rename(folder)", "pass"),
    ("what was killed stays", "shutil.rmtree(unfinished, ignore_errors=True)", "pass"),
    ("any folder is replaced", "if not (replace or _is_free(folder)):", "if False:"),
    (
        "every process writes files",
        "    if not process.is_first():\n",
        "    if False:\n",
    ),
)

MUTANTS = (
    *(_PACKING + _STAGE_DATA + _PIPELINE + _SOURCES + _LANGUAGE + _MIXTURE + _SHARDS),
    *(_CACHE + _FORMS + _CONTAINERS + _COLUMNS + _STREAMS + _FILES + _STORAGE),
)
