"""Speed and memory benchmarks, each against other implementations in the same run."""
