"""Text tables: padding, alignment, short rows, Markdown; counts in words."""

from llamachat.tables import markdown_table, plural, text_table


def test_columns_are_padded_to_their_widest_cell_and_short_rows_end_early() -> None:
    rows = [("name", "n", "note"), ("a", "1", "x"), ("bb", "20")]
    assert text_table(rows) == ["name  n   note", "a     1   x", "bb    20"]
    assert text_table(rows, align="<><", indent=" ") == [" name   n  note", " a      1  x", " bb    20"]


def test_the_last_alignment_counts_for_all_columns_after_it() -> None:
    assert text_table([("aa", "bb", "cc"), ("1", "2", "3")], align="<>") == ["aa  bb  cc", "1    2   3"]


def test_markdown_has_a_rule_below_its_head() -> None:
    rows = [("name", "n"), ("a", "10")]
    assert markdown_table(rows, align="<>") == ["| name | n |", "| --- | ---: |", "| a | 10 |"]
    assert markdown_table(rows, is_padded=True) == ["| name | n  |", "|------|----|", "| a    | 10 |"]


def test_a_count_agrees_with_its_noun() -> None:
    assert [plural(count, "pair") for count in (0, 1, 2)] == ["0 pairs", "1 pair", "2 pairs"]
    assert [plural(count, "entry", "entries") for count in (1, 12)] == ["1 entry", "12 entries"]
