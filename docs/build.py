"""Build the documentation site: the Markdown pages of the repository, and a page for each module from its docstrings.

    python -m docs.build [FOLDER]        (default: site)

Stops with exit status 1 at whatever is broken: a warning, a link that leads nowhere, a name that does not exist.
"""

import os
import re
import shutil
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pdoc
from pdoc.doc import Module

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index",
    "llava/assets/tiny/README.md": "tiny",
    "docs/methods.md": "methods",
    "docs/results.md": "results",
    "docs/performance.md": "performance",
    "docs/hf.md": "hf",
    "configs/README.md": "experiments",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
PACKAGES = ("llava", "eval")
SCRIPT = re.compile("<script.*?</script>", re.DOTALL)
ELSEWHERE = {"llava.vllm.qwen2_5_vl"}
"""Modules that need what this project does not install: vLLM."""

LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=[)#])")


def main(site: Path) -> int:
    warnings.simplefilter("error", UserWarning)  # pdoc's own are of this kind
    pdoc.render.configure(docformat="google", include_undocumented=False, template_directory=ROOT / "docs")
    shutil.rmtree(site, ignore_errors=True)
    modules = {name: Module.from_name(name) for name in sorted(module_names())}
    for path, name in PAGES.items():
        write(site / f"{name}.html", pdoc.render.html_module(page(path, name, site), modules))
    for name, module in modules.items():
        write(site / f"{name.replace('.', '/')}.html", pdoc.render.html_module(module, modules))
    write(site / "search.js", pdoc.render.search_index(modules))
    problems = broken(site)
    print("\n".join(problems) or f"{len(PAGES)} pages and {len(modules)} modules in {site}")
    return 1 if problems else 0


def module_names() -> Iterator[str]:
    """Packages and all that is in them, also what `__all__` leaves out; without packages that say nothing."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name not in ELSEWHERE and (path.stat().st_size or path.parent.name == package):
                yield name


def page(path: str, name: str, site: Path) -> Module:
    """A Markdown file as pdoc sees modules. Files of the repository that it links to are put on the site as well."""

    def on_site(link: re.Match[str]) -> str:
        target = os.path.normpath(Path(path).parent / link[1])
        if target in PAGES:
            return f"{PAGES[target]}.html"
        if (ROOT / target).is_file():
            (site / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / target, site / target)
        return target

    module = types.ModuleType(name, LINK.sub(on_site, (ROOT / path).read_text()))
    module.__dict__.update(__docformat__="markdown", __all__=[])
    return Module(module)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def broken(site: Path) -> list[str]:
    """Links of the site that lead nowhere, and names in docstrings that pdoc found nothing to link to."""
    problems = []
    pages = {path: SCRIPT.sub("", path.read_text()) for path in sorted(site.resolve().rglob("*.html"))}
    for path, text in pages.items():
        for link, anchor in set(re.findall(r'(?:href|src)="(?!\w+:)([^"#]*)(?:#([^"]*))?"', text)):
            target = (path.parent / link).resolve() if link else path
            if not target.is_file() or (anchor and f'id="{anchor}"' not in pages.get(target, "")):
                problems.append(f"{path.name}: a link to {link}#{anchor}, which does not exist")
        for name in set(re.findall(r"<code>((?:llava|eval)\.[\w.]+\w)(?:\(\))?</code>", text)):
            problems.append(f"{path.name}: `{name}` is named, but nothing is called so")
    return problems


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site")))
