"""What the page on incidents says about keys that are not replaced: a new federation with the same sites."""

from pathlib import Path

import pytest

from fedvision.audit.log import verify_log
from fedvision.secagg import identity
from fedvision.secagg.roster import load_roster
from fedvision_server.home import ServerHome
from fedvision_sites.cli import main as site_main
from fedvision_sites.home import SiteHome
from tests.conftest import write_site
from tests.test_backup import Place, path, place  # noqa: F401
from tests.test_docs import ROOT, fences

INIT_SERVER, INIT_SITE, ENROL, JOIN = fences(ROOT / "docs" / "how-to" / "incidents.md", "sh")


def test_a_new_federation_with_the_same_sites_has_other_keys_and_leaves_the_old_one_as_it_was(
    place: Place,  # noqa: F811
    path: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_site(place.root, "lung-ct")
    old, server = place.server, ServerHome(place.root / "new-server")
    folders = (old.root, place.site("utrecht").root)
    before = {file: file.read_bytes() for root in folders for file in root.rglob("*") if file.is_file()}
    place.do(INIT_SERVER, path)
    place.do(INIT_SITE, path)
    place.do(ENROL, path, "y\n")
    place.do(JOIN, path, "y\n")

    for name in ("governance_pub", "server_pub", "ca_key", "tls_key"):
        assert Path(getattr(old, name)).read_bytes() != Path(getattr(server, name)).read_bytes()
    governance = identity.load(server.governance).public
    (member,) = load_roster(server.roster, governance).sites
    site = SiteHome(place.root / "new-site")
    assert (member.name, member.key) == ("utrecht", identity.load(site.identity).public.hex())
    assert member.key != identity.load(place.site("utrecht").identity).public.hex()
    verify_log(server.audit, identity.load(server.server_key).public)
    verify_log(old.audit, identity.load(old.server_key).public)
    assert {file: file.read_bytes() for file in before} == before

    capsys.readouterr()
    kit = ["join", str(place.root / "utrecht.kit.json"), "--home", str(place.site("utrecht").root)]
    digits = identity.fingerprint(governance)
    assert site_main([*kit, "--governance", digits]) == 2  # the old folder pins the old key
    assert "governance" in capsys.readouterr().err
