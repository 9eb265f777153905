"""What README.md and docs/ say of other tables than a benchmark's, figure by figure.

A claim is a page, its words with ``{}`` for each figure, and for each its table and cell: the keys
that lead there (``first columns of a line/column``), one cell over another (a pair), or a number
that is computed.
"""

from dmin.attribution.confidence import SURE
from dmin.attribution.search.contenders import RELATIVE

COVERAGE, ARTISTS = "coverage/coverage.csv", "artists/results.csv"
SEARCH, PRECISION = "retrieval/results.json", "retrieval/precision.json"
BENCH, FLUX, SCALE = "bench/results.json", "flux_scale/results.json", "scale/results.csv"
LDS, DIGITS = "lds/full/results.parquet", "digits/results.csv"
HUNDRED, MILLION, WIDE = (
    f"results/real {rows}/" for rows in ("100000 4096", "1000000 4096", "200000 40960")
)
PARTS = ["ddpm_cifar/", "sd_unet/", "mmdit/", "mmdit_lora/"]
COSTS = [f"{part}auto/ratio" for part in PARTS]
SUBSETS = "generated subsets LDS "
# 10⁹ operations: forward, weight gradients, and forming them by `auto`, a transform being 0.25e-3.
FORMED = [
    (12.4, 12.1, 4.3),
    (47.9, 43.6, 17.6 + 6185 * 0.25e-3),
    (37.0, 35.6, 0.1 + 3851 * 0.25e-3),
]
LIMITS = [1 - (plain - formed) / (3 * forward) for forward, plain, formed in FORMED]

CLAIMS = [
    (
        *("README.md", "at {} to {} times the cost of 200 passes", "ownership/cost.csv"),
        ["tokens, sequence first/median", "unet/median"],
    ),
    (
        *("README.md", "of the first five drawings, {} are by", ARTISTS),
        ["trained dmin/P@5"],
    ),
    (
        *("README.md", "(at most {} by image similarity, {} by chance)", ARTISTS),
        ["none ssim/P@5", 0.5],
    ),
    (
        "README.md",
        "{} or {} redraws a case: DMin with the default sketch {} to {} (of the sketch), {} to {} "
        "(of sketch and noise); `factored` covers {} at worst",
        COVERAGE,
        [
            *(f"sketch dmin auto {cosines}/redraws" for cosines in ("high", "low")),
            *(f"{b} dmin auto {c}/coverage" for b in ("sketch", "total") for c in ("high", "low")),
            "sketch grad_cos factored high/coverage",
        ],
    ),
    (
        "README.md",
        "100,000 × 4,096: {} ms exact ({} % of memory bandwidth), {} ms certified, that is, proven "
        "to give the same answer (a NumPy scan: {} ms, faiss Flat: {}); 1,000,000 × 4,096: {} and "
        "{} ms (NumPy {} s)",
        SEARCH,
        [
            *(HUNDRED + "exact 1/best", (HUNDRED + "of memory", 0.01)),
            *(HUNDRED + way + "/best" for way in ("certified/1", "numpy 1", "faiss flat 1")),
            *(MILLION + way + "/best" for way in ("exact 1", "certified/1")),
            (MILLION + "numpy 1/best", 1000),
        ],
    ),
    (
        "README.md",
        "DDPM UNet {} ×, SD1.x-like UNet {} ×, two SD3 blocks {} ×, LoRA on them {} ×; the "
        "published way {} to {} × on whole networks",
        BENCH,
        [*COSTS, *(f"{part}published/ratio" for part in PARTS[:2])],
    ),
    (
        "README.md",
        "{} instead of {} GB of raw gradients, {} million times less; forming them costs {} to {} "
        "of plain training for its blocks, batch 1",
        FLUX,
        [
            *("whole/stored_bytes", ("whole/raw_bytes", 1e9), ("whole/reduction", 1e6)),
            *(
                (f"parts/{part}/collect_seconds", f"parts/{part}/plain_seconds")
                for part in ("1+1", "0+1")
            ),
        ],
    ),
    (
        *("README.md", "an *untrained* network scores {}", "digits/untrained/results.csv"),
        ["generated_digits label precision@10 dmin/mean"],
    ),
    (
        *("docs/search.md", "(10⁵ × 4,096: {} ms, 2·10⁵ × 40,960: {} s on two cores)", SEARCH),
        [HUNDRED + "exact 1/best", (WIDE + "exact 1/best", 1000)],
    ),
    ("docs/search.md", "{}·10⁻⁶ ‖q‖ ‖z‖", "", [RELATIVE * 1e6]),
    ("docs/search.md", "by more than {} standard errors of their", "", [SURE]),
    ("docs/evaluation.md", "±{} standard errors", "", [SURE]),
    (
        *("docs/scores.md", "score of {} on generated digits, of {} attainable", LDS),
        [SUBSETS + name + "/mean" for name in ("dmin", "ceiling")],
    ),
    ("docs/scores.md", "`method=blend` predicts more ({})", LDS, [SUBSETS + "blend/mean"]),
    (
        "docs/scores.md",
        "copies first, recall {}",
        DIGITS,
        ["exact_copies source recall@1 dmin/mean"],
    ),
    (
        "docs/performance.md",
        "takes {} of plain training for the DDPM UNet, {} for the SD1.x-like one, {} for the MMDiT "
        "and {} with LoRA",
        BENCH,
        COSTS,
    ),
    *(
        ("docs/performance.md", says + " | {} M | ", BENCH, [(f"{part}auto/parameters", 1e6)])
        for says, part in zip(("DDPM UNet, 32²", "latents 32²", "333 tokens"), PARTS, strict=False)
    ),
    ("docs/performance.md", "LoRA (limits {}, {}, {}): the targets of 1.0 and .8 are", "", LIMITS),
    ("docs/performance.md", "= {} for the DDPM UNet, {} for the SD1.x-like one and {}", "", LIMITS),
    ("docs/store.md", "score differ by {},", PRECISION, ["gap of the 10th to the 11th, mean"]),
    ("docs/store.md", "for {} % more bytes", "", [100 * 4 / 256]),
    (
        "docs/scale.md",
        "10⁷ examples are {} years",
        SCALE,
        [("Flux, 12 B, 1024² 10000000 1/seconds", 365 * 86400)],
    ),
    ("docs/sketches.md", "about 1/√k: {} at k = 4,096", "", [4096**-0.5]),
]
# What is no measurement: names, examples, aims, and what the page says it computed.
UNMEASURED = {
    "README.md": [
        *("[Apache 2.0]", "[CC-BY 4.0]", "Python 3.11 or newer", "takes 2.5 GB with torch's CPU"),
        "more than 6 GB with the CUDA build",
    ],
    "docs/commands.md": ["3 and 3.5, Flux.1, FLUX.2", "Wan 2.1 and 2.2"],
    "docs/models.md": [
        "Wan 2.2 has two networks",
        "section 2.5), among",
        "has the score 2.5, as in the pipeline",
        "(Flux dev) | 3.5 |",
    ],
    "docs/performance.md": [
        "| 12.4 | 12.1 | 4.3 | 4.3 | 1 |",
        "| 47.9 | 43.6 | 26.6 | 17.6 | 6,185 positions for 9.0 |",
        "| 37.0 | 35.6 | 35.6 | 0.1 | 3,851 positions for 35.5 |",
        *("(about 0.25 · 10⁶ operations)", "1 − (12.1 − 4.3)/(3 · 12.4) ="),
        *("one H200 (4.8 TB/s; 700 TFLOP/s", "10 ms at half of the peak) and about 3 ms"),
        "sketching, 0.95 to 1.05 times plain training, if",
    ],
    "docs/scale.md": [
        *("a Flux prompt is 4.2 MB", "12 B in bfloat16 take 24 GB: a 24 GB card"),
        "for Flux in bfloat16 24 GB + 10 GB for T5 per process, 270 GB on a node of eight",
    ],
    "docs/scores.md": ["where the typical one is 0.2, and unremarkable where it is 2.9"],
    "docs/search.md": ["A number such as 6.2"],
    "docs/sweeps.md": ["for Hydra 1.3 it"],
}
CLAIMS += [(page, words, "", []) for page, some in UNMEASURED.items() for words in some]
