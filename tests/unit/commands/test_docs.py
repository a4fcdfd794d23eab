"""`titan-cpt docs`: the path of the built site, and how to build it."""

import pytest

from titan_cpt.cli import main
from titan_cpt.commands import docs
from titan_cpt.errors import DataError


def test_the_first_site_that_is_built_is_opened(tmp_path, monkeypatch, capsys):
    """That of a clone before a packaged one; --print opens no browser."""
    sites = (tmp_path / "clone" / "site", tmp_path / "package" / "site")
    for site in sites:
        site.mkdir(parents=True)
    (sites[1] / "index.html").touch()
    assert docs.first_page(sites) == sites[1] / "index.html"
    (sites[0] / "index.html").touch()
    assert docs.first_page(sites) == sites[0] / "index.html"

    opened = []
    monkeypatch.setattr(docs, "SITES", sites)
    monkeypatch.setattr("webbrowser.open_new_tab", opened.append)
    with pytest.raises(SystemExit) as leaving:
        main(["docs", "--print"])
    assert (leaving.value.code, capsys.readouterr().out, opened) == (0, f"{sites[0] / 'index.html'}\n", [])
    with pytest.raises(SystemExit) as leaving:
        main(["docs"])
    assert leaving.value.code == 1  # no browser answered
    assert opened == [(sites[0] / "index.html").as_uri()]
    assert "open this file" in capsys.readouterr().err


def test_a_site_that_is_not_built_is_a_message_with_the_command(tmp_path):
    """In a clone with its path; an installed package has none."""
    (tmp_path / "mkdocs.yml").touch()
    with pytest.raises(DataError, match=rf"the documentation is not built; build it: `cd {tmp_path} && \./scripts/set"):
        docs.first_page((tmp_path / "site",))
    with pytest.raises(DataError, match="build it in a clone"):
        docs.first_page((tmp_path / "lib" / "site",))
