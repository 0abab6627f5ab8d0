"""Tables of the commands."""

from timm_sape2.commands.table import print_table


def test_columns_are_as_wide_as_their_widest_cell(capsys):
    print_table([('name', 'count'), ('a', '1,000,000'), ('bcdefg', '')])
    assert capsys.readouterr().out == 'name    count\na       1,000,000\nbcdefg\n'
