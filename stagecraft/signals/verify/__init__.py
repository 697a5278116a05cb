"""Verifiers that ship, by kind of answer; `table` names them."""
