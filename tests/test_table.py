"""Tables of text."""

from timm_sape2._table import markdown_table, text_table


def test_columns_are_as_wide_as_their_widest_cell():
    table = text_table([('name', 'count'), ('a', '1,000,000'), ('bcdefg', '')])
    assert table == 'name    count\na       1,000,000\nbcdefg'


def test_markdown_table():
    table = markdown_table([{'name': 'a', 'value': 1}, {'name': 'b', 'value': 2}])
    assert table == '| name | value |\n| --- | --- |\n| a | 1 |\n| b | 2 |'
