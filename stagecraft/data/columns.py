"""Rows of Arrow's columns, as parquet has them too, by the values that JSON has."""

import base64
import datetime
import decimal
import warnings

# Names of Arrow's types whose values JSON has.
_PLAIN = {"string", "large_string", "string_view", "bool", "null"} | {
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("halffloat", "float", "double"),
}


def values(batch) -> list[dict | None]:
    """Returns the rows of a pyarrow.RecordBatch; None for one that is not UTF-8."""
    try:
        # Of a key that a map holds twice, the last value counts, as in JSON.
        with warnings.catch_warnings(action="ignore"):
            rows = batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        if len(batch) > 1:
            rows = (batch.slice(i, 1) for i in range(len(batch)))
            return [value for row in rows for value in values(row)]
        return [None]
    return rows if all(map(_is_plain, batch.schema.types)) else [*map(_as_json, rows)]


def _is_plain(type_):
    """Whether the values of a column are what JSON has, or columns of such."""
    nested = [type_.field(i).type for i in range(type_.num_fields)]
    if nested:
        return all(map(_is_plain, nested))
    return str(type_) in _PLAIN


def _as_json(value):
    """Returns a value of a column as JSON writes it: times as ISO 8601 text."""
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_json(one) for one in value]
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if hasattr(value, "isoformat"):  # a date, a time, or both
        return value.isoformat()
    return value
