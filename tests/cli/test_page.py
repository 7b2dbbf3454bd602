"""The page of a report: nothing in it is taken for HTML, and it needs no other file."""

from eupmu_jax.cli import page


def test_text_is_escaped_wherever_it_stands(tmp_path):
    evil = "<script>&"
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    parts = [
        page.heading(evil),
        page.paragraph(evil),
        page.emphasised(evil),
        page.listed([evil]),
        page.preformatted(evil),
        page.table([(evil, {evil: evil})]),
    ]
    parts += [page.folded(evil, page.preformatted(evil)), page.picture(picture)]
    written = page.page(evil, parts)
    assert "<script" not in written
    assert written.count("&lt;script&gt;&amp;") == 12
    assert 'src="data:image/png;base64,iVBORw=="' in written
    assert "http" not in written


def test_a_table_has_a_column_for_every_name():
    rows = [("a", {"x": 0.123456, "y": "1.0 ± .1"}), ("b", {"z": 2})]
    assert page.table(rows) == (
        "<table><tr><th></th><th>x</th><th>y</th><th>z</th></tr>"
        "<tr><td>a</td><td>0.1235</td><td>1.0 ± .1</td><td></td></tr>"
        "<tr><td>b</td><td></td><td></td><td>2</td></tr></table>"
    )
