"""What a command settles before it imports JAX."""

import os

from medrlvr_jax.host import environment


def test_programs_are_stored_in_the_users_cache_unless_the_user_names_a_folder(tmp_path, monkeypatch):
    """A folder that the user names keeps its own rules: JAX cannot limit one that was filled without limit."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "medrlvr_jax" / "xla"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache"):
        (folder / name).touch()
    environment.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(4 * 2**30)
    assert sorted(file.name for file in folder.iterdir()) == ["whole-atime", "whole-cache"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE")
    environment.prepare()
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
