"""One file per question: a frozen Result, `compute(...)` which never draws or writes, `plot(result)` which never computes."""
