"""The page of a GPU run: what ran, and what each part found."""

from typing import Any

from bench import kernel_page, readme
from bench.report import in_words
from model.page import Page


def page(document: dict[str, Any]) -> Page:
    made = Page(f"GPU run on {document['machine']['gpu']['name']}")
    made.text(in_words(document["machine"]))
    made.heading("Parts")
    made.table(*readme.part_table(document))
    for part in document["parts"]:
        if part["state"] in ("failed", "cut short"):
            made.heading(f"{part['name']}: {part['state']}")
            for line in part["tail"][-15:]:
                made.text(line)
    kernels = readme.kernels_of(document)
    if kernels is not None:
        kernel_page.add_measured(made, kernels)
    for part in document["parts"]:
        for name, columns, rows in readme.plain_tables(part):
            made.heading(name)
            made.table(columns, rows)
    return made
