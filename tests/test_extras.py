"""Where a package of an extra is missing, one sentence says which, and what to type."""
import re

from timm_arl.extras import EXTRAS


def test_the_packages_are_those_that_pip_installs(repo):
    project = (repo / 'pyproject.toml').read_text()
    for extra, packages in EXTRAS.items():
        listed = re.search(rf'^{extra} = \[(.*?)\]', project, re.DOTALL | re.MULTILINE).group(1)
        assert tuple(re.findall(r'"([a-z0-9-]+)', listed)) == packages
