"""The base directory of a host that several clones of this repository start."""

import pytest

from scripts import comfyui


def link_in(base):
    return base / "custom_nodes" / comfyui.PACK_NAME


@pytest.mark.parametrize("earlier", [None, "itself", "another clone", "a clone that is gone"])
def test_the_pack_is_the_one_that_starts_the_host(tmp_path, capsys, earlier):
    link = link_in(tmp_path)
    link.parent.mkdir()
    (tmp_path / "another clone").mkdir()
    if earlier:
        link.symlink_to(comfyui.PACK if earlier == "itself" else tmp_path / earlier)
    comfyui.prepare_base(tmp_path)
    assert link.resolve() == comfyui.PACK
    assert ("clone" in capsys.readouterr().err) == ("clone" in str(earlier))
    assert (tmp_path / "another clone").is_dir()


def test_a_folder_in_the_place_of_the_link_is_kept(tmp_path):
    link_in(tmp_path).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is not a link to .*: move it away"):
        comfyui.prepare_base(tmp_path)
    assert link_in(tmp_path).is_dir()
