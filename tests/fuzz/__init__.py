"""Mutated inputs for every reader of files that others may have made.

    python tests/fuzz [READER ...] --first 0 --count 1000 [--findings DIR]

An input is a pure function of the reader and its seed, so that a run is resumed with --first, and a finding repeated
with --first SEED --count 1. The inputs are read in a process with bounded memory, which a watchdog follows: whatever
ends it, keeps it busy for long or makes it need more memory is a finding. Of every input the reader must either

    refuse it: a UserError of one line that says where, and quotes neither a subject's id nor a value; or
    accept it: then what was read equals what another program reads of the same bytes (of Parquet: Polars, or PyArrow in
        one piece and without our checks where Polars can't or reads a contradictory footer otherwise, which is counted
        apart; of text, YAML and safetensors: a plain reading), and the format's invariants hold, which each reader's
        class names.

`tests/fuzz/corpus/READER/NAME/` holds the changed files of inputs that once were findings; test_fuzz.py replays them.
"""
