"""A table as one HTML file that sorts and filters itself, with nothing to fetch.

By hand, since itables, which would do the same, puts its 0.7 MB of DataTables into each such file.
"""

import html

import pandas as pd

STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; margin: 20px;
  color: #1b1f24; background: #fff; }
h1 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: #57606a; max-width: 75em; }
input { font: inherit; padding: 4px 8px; margin-bottom: 10px; width: 22em; max-width: 90%;
  border: 1px solid #c8ced6; border-radius: 5px; }
#count { color: #57606a; margin-left: 8px; }
.frame { overflow: auto; max-height: calc(100vh - 150px); border: 1px solid #d8dee4;
  border-radius: 6px; width: fit-content; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 11px; text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: #eef1f5; border-bottom: 1px solid #c8ced6; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
th button::after { content: " \\2195"; color: #9aa4af; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #0072b2; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #0072b2; }
tbody tr:nth-child(even) { background: #f7f9fb; }
tbody tr:hover { background: #e7f1f9; }
.number { text-align: right; }
"""
SCRIPT = """
const body = document.querySelector("tbody"), count = document.getElementById("count");
const heads = [...document.querySelectorAll("th")], rows = [...body.rows];
const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
const compare = (a, b) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  return isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y;
};
heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  rows.sort((a, b) => {
    const x = value(a, i), y = value(b, i), empty = (x === "") - (y === "");
    return empty || (down ? compare(y, x) : compare(x, y));
  });
  body.append(...rows);
}));
const search = document.querySelector("input");
const show = () => {
  const words = search.value.toLowerCase().split(/\\s+/);
  let shown = 0;
  rows.forEach(row => {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    shown += !row.hidden;
  });
  count.textContent = shown + " of " + rows.length + " rows";
};
search.addEventListener("input", show);
show();
"""


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of `frame` as text: whole numbers in full, others with about four digits and the
    same number of decimals down a column; nothing for a missing value.
    """
    columns = [_shown_column(frame.iloc[:, place]) for place in range(frame.shape[1])]
    return pd.DataFrame(dict(zip(frame.columns, columns, strict=True)), index=frame.index)


def _shown_column(column: pd.Series) -> list[str]:
    values = column.astype(object).where(column.notna(), None).tolist()
    if not pd.api.types.is_numeric_dtype(column.dtype):
        return ["" if value is None else str(value) for value in values]
    numbers = [float(value) for value in values if value is not None]
    whole = all(number.is_integer() for number in numbers)
    largest = max((abs(number) for number in numbers), default=0.0)
    decimals = 0 if whole else max(0, 4 - max(1, len(str(int(largest)))))
    comma = "," if largest >= 10_000 else ""
    return ["" if value is None else f"{value:{comma}.{decimals}f}" for value in values]


def _cell(value: object, text: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and text:
        return f'<td class="number" data-v="{value!r}">{text}</td>'
    return f"<td>{html.escape(text)}</td>"


def table_html(frame: pd.DataFrame, title: str, caption: str) -> str:
    """`frame` as a self-contained HTML document. The same frame always gives the same text."""
    plain = frame.astype(object).where(frame.notna(), None)
    pairs = zip(plain.to_numpy(), shown(frame).to_numpy(), strict=True)
    rows = "\n".join(
        "<tr>" + "".join(map(_cell, values, texts)) + "</tr>" for values, texts in pairs
    )
    if not len(frame):
        caption += " This run has no such rows."
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes]
    heads = "".join(
        f'<th{" class=number" if number else ""} scope="col">'
        f'<button type="button">{html.escape(str(column))}</button></th>'
        for column, number in zip(frame.columns, numeric, strict=True)
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1><p>{html.escape(caption)}</p>
<input type="search" placeholder="filter rows" aria-label="filter rows"><span id="count"></span>
<div class="frame"><table><thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
<script>{SCRIPT}</script></body>
</html>
"""
