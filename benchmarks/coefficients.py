"""Which coefficients should the recipes ship? Those with the best worst case over models and seeds, relative to RIA.

    python benchmarks/coefficients.py measure --model smollm2 --masks 2:4 0.6:matrix --tokens 2048
    python benchmarks/coefficients.py measure --model gemma3 --masks 2:4 --candidates 1,3.3,0.84,31,0.98
    python benchmarks/coefficients.py report

A candidate is row, column, neighbourhood, kernel size, exponent. Without --candidates, `measure` takes every one that
has been measured on any model, so that the table has no holes. Perplexity on validation text, which no table of results
uses; every record is appended to results/coefficients.jsonl as soon as it is there, and not measured again.
"""

import argparse

from crepe_llm.search.space import RIA, WANDA, Coefficients
from pho_common import MODELS, Bench, parse_mask
from records import LEGEND, RESULTS, Row, append, dagger, is_done, read, read_old, with_old

# Raised by every change of a default or of how something is measured. 1: rows without provenance.
PROTOCOL = 2
PATH = RESULTS / "coefficients.jsonl"
CELL = ("model", "seed", "mask", "tokens", "coefficients")


def parse(text: str) -> Coefficients:
    row, column, neighbourhood, kernel_size, exponent = map(float, text.split(","))
    return Coefficients(1.0, column / row, neighbourhood / row, int(kernel_size), exponent)


def measure(options: argparse.Namespace) -> None:
    records = read_old(PATH) + read(PATH)
    for seed in options.seeds:
        bench = None
        for mask in options.masks:
            candidates = options.candidates or [
                Coefficients(**record["coefficients"]) for record in records if record["mask"] == mask
            ]
            for candidate in dict.fromkeys([RIA, WANDA, *candidates]):
                record = {
                    "model": options.model,
                    "seed": seed,
                    "mask": mask,
                    "tokens": options.tokens,
                    "coefficients": candidate.fields,
                }
                if is_done(record, records, PROTOCOL):
                    continue
                bench = bench or Bench(options.model, seed)
                with bench.pruned(candidate, parse_mask(mask)):
                    record["perplexity"] = bench.perplexity(bench.corpus.valid, options.tokens)
                records.append(append(PATH, PROTOCOL, record))
                print(f"{options.model}, seed {seed}, {mask}: {record['perplexity']:.2f}: {candidate}", flush=True)


def report(options: argparse.Namespace) -> None:
    records = with_old(read(PATH), read_old(PATH), PROTOCOL, CELL)
    for mask in dict.fromkeys(record["mask"] for record in records):
        table: dict[Coefficients, dict[tuple[str, int, int], Row]] = {}
        for record in records:
            if record["mask"] == mask:
                cell = (record["model"], record["seed"], record["tokens"])
                table.setdefault(Coefficients(**record["coefficients"]), {})[cell] = record
        cells = sorted({cell for row in table.values() for cell in row})
        whole = {
            candidate: [row[cell]["perplexity"] / table[RIA][cell]["perplexity"] for cell in cells]
            for candidate, row in table.items()
            if len(row) == len(cells)
        }
        names = [f"{model}, seed {seed}" for model, seed, _ in cells]
        print(f"\n{mask}: perplexity relative to RIA's, {'/'.join(map(str, sorted({c[2] for c in cells})))} tokens\n")
        print(f"| row 1, column, neighbourhood, kernel, exponent | worst | {' | '.join(names)} |")
        print("|---" * (len(cells) + 2) + "|")
        for candidate, ratios in sorted(whole.items(), key=lambda item: max(item[1]))[: options.top]:
            c, marks = candidate, [dagger([table[candidate][cell], table[RIA][cell]]) for cell in cells]
            name = f"{c.column:.3g}, {c.neighbourhood:.3g}, {c.kernel_size}, {c.activation_exponent:.3g}"
            texts = [f"{ratio:.3f}{mark}" for ratio, mark in zip(ratios, marks, strict=True)]
            print(f"| {name} | {max(ratios):.3f} | {' | '.join(texts)} |")
    print(f"\n{LEGEND}" * bool(dagger(records)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("--model", choices=MODELS, default="smollm2")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration windows")
    command.add_argument("--masks", nargs="+", default=["2:4"], help='such as "4:8" or "0.5:row"')
    command.add_argument("--tokens", type=int, default=2048, help="of validation text")
    command.add_argument("--candidates", type=parse, nargs="+", metavar="R,C,N,K,A")
    command.set_defaults(run=measure)
    command = commands.add_parser("report")
    command.add_argument("--top", type=int, default=12, help="rows of each table")
    command.set_defaults(run=report)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
