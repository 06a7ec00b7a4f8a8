"""From raw text to a corpus: what `tools/prepare_data.py` runs; and from real sets to the records of a task.

run.py        the plan, the stages, the shards
readers.py    files -> records, none lost: JSONL, text, Parquet, web pages; packed or not; on a disk or behind a URL
clean.py      datatrove's filters, scrubbing and near-duplicates, without network and without luck
steps.py      what a task of a stage does, from files to token ids
executors.py  who runs the tasks: this process, or datatrove's executors here, on Ray or on Slurm
report.py     counts that add up and reasons with examples, as JSON and as a page
overlap.py    contamination: what of an evaluation set stands in the text

debian_records.py   Debian's package descriptions -> summaries, or translations
package_records.py  six real sets out of installed packages
python_records.py   the interpreter's own library and numbers -> records of four tasks
"""
