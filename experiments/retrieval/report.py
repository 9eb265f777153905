"""Table and picture of what run.py measured."""


def _ms(value):
    return "" if value is None else f"{value['best']:,.1f} ({value['median']:,.1f})"


def lines(each):
    """Yield of each way to search: name, build s, bytes a row, ms of 1 and 64 queries, recall."""
    n = each["N"]
    if "exact 1" in each:
        rate = f"{each['of memory']:.0%} of memory's rate; {each['of GEMM']:.0%} of GEMM's"
        yield "exact", None, 0, each["exact 1"], each["exact 64"], f"1.000; {rate}"
        if "exact 4" in each:
            yield "exact, 4 queries", None, 0, each["exact 4"], None, ""
    if "certified" in each:
        c = each["certified"]
        what = f"{'1.000, proven' if c['equal'] else 'NOT EQUAL'}; reads {c['part read']:.2%}"
        what += " a query (of 64, most are scanned together)"
        yield "certified", c["build s"], c["bytes"] / n, c["1"], c["64"], what
    for name in ("hnsw", "ivf"):
        if name in each:
            c = each[name]
            yield name.upper(), c["build s"], c["bytes"] / n, c["1"], c["64"], f"{c['recall']:.3f}"
    if "faiss flat 1" in each:
        size = each["faiss flat bytes"] / n
        one, many = each["faiss flat 1"], each["faiss flat 64"]
        yield "faiss Flat, all numbers", each["faiss flat build s"], size, one, many, ""
    if "numpy 1" in each:
        yield "NumPy", None, 0, each["numpy 1"], None, ""


def table(results):
    """Return the tables of README.md."""
    out = [
        "| rows | search | build s | bytes a row, beside the store | ms, 1 query | ms, 64 queries"
        " | recall@10; how |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in results:
        head = f"{each['kind']}, {each['N']:,} × {each['width']:,}"
        for name, build, size, one, many, what in lines(each):
            seconds = "" if build is None else f"{build:,.1f}"
            out.append(
                f"| {head} | {name} | {seconds} | {size:,.0f} | {_ms(one)} | {_ms(many)} | {what} |"
            )
            head = ""
    out += [
        "",
        "| rows | store GB | written at GB/s | first opening s | opening ms | cold: certified ms"
        " | cold: exact ms | disk GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        if "write s" not in each or "cold" not in each:
            continue
        cold = each.get("cold", {})
        size = each["store bytes"] / 1e9
        proven = ", ".join(f"{ms:,.0f}" for ms in cold.get("certified ms", []))
        plain = ", ".join(f"{ms:,.0f}" for ms in cold.get("exact ms", []))
        rate = cold.get("reading the files GB/s", 0)
        out.append(
            f"| {each['kind']}, {each['N']:,} × {each['width']:,} | {size:.2f}"
            f" | {size / each['write s']:.2f} | {each['first opening ms'] / 1e3:.1f}"
            f" | {each['opening ms']:,.0f} | {proven} | {plain} | {rate:.2f} |"
        )
    for each in (each["batch"] for each in results if "batch" in each):
        size = ", ".join(f"{name} {mb:,.0f} MB" for name, mb in sorted(each["MB"].items()))
        out += [
            "",
            f"10,000 queries, 100,000 × 4,096: {each['retrieve s']:.1f} s from stores to a ranking"
            f" ({each['GFLOP/s']:.0f} GFLOP/s), {each['CSV, JSON, Parquet s']:.1f} s to files,"
            f" {each['HTML s']:.1f} s to a page with its pictures beside it ({size}).",
        ]
    return "\n".join(out) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [each for each in results if "exact 1" in each and "certified" in each]
    if not shown:
        return
    down = 1 if len(shown) <= 3 else 2
    across = -(-len(shown) // down)
    size = 4.2 * across, 3.1 * down
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, sharex=True)
    colors = {"exact": "C0", "certified": "C1", "HNSW": "C2", "IVF": "C2"}
    for axis in axes.ravel()[len(shown) :]:
        axis.set_axis_off()
    for axis, each in zip(axes.ravel(), shown, strict=False):
        rows = [line for line in lines(each) if line[0] != "exact, 4 queries"][::-1]
        for place, (name, _, _, one, _, what) in enumerate(rows):
            axis.barh(place, one["best"], color=colors.get(name, "0.65"))
            first = what.split(";")[0].split(",")[0]
            note = f" recall {first}" if name in ("HNSW", "IVF") else ""
            note = f" {what.split(';')[1].strip()[:12]}" if name == "certified" else note
            label = f"{one['best']:,.1f} ms{note}"
            over = {"facecolor": "w", "edgecolor": "none", "pad": 0.6}
            axis.text(one["best"] * 1.15, place, label, va="center", fontsize=7, bbox=over)
        limit = each["N"] * each["width"] * 2 / each["memory GB/s"] / 1e6
        axis.axvline(limit, color="k", ls="--", lw=1, zorder=0)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(0.3, 3e5)
        title = f"{each['kind']}: {each['N']:,} × {each['width']:,}"
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("ms, one query, rows in memory\n(dashed: reading all rows)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
