# What each target does is in README.md. None but `vm`, `dist` and `bench` needs anything but
# a Rust toolchain and Python 3; the latter two need rustup.
.PHONY: run dist test real demo bench laws fuzz chaos accept gpu vm

RESIDENTD := target/release/residentd

# Everything needed, then the quick start on 127.0.0.1:8080. Ctrl-C ends it.
run:
	@scripts/run

# The binary that is shipped, as target/trained/residentd: built twice and trained in between.
dist:
	@scripts/dist

# Every check and test that CI requires.
test:
	@scripts/test

# The story against real engines and real models.
real:
	@scripts/real

# The story step by step, with what `ps` says of the same processes.
demo:
	@scripts/demo

# What it costs, a line for each figure; SHORT=1 is a smoke test, KEEP=1 keeps the results, PEER=PATH adds a proxy.
bench:
	@scripts/bench $(if $(SHORT),--short) $(if $(KEEP),--keep) $(if $(PEER),--peer "$(PEER)")

# A long search for events that break a law of the policy; CASES=1000000 searches longer.
laws:
	@scripts/laws

# A fuzzer's bodies for the readers of bodies, a minute for each reader; SECONDS=600 is longer.
fuzz:
	@scripts/fuzz "$(SECONDS)"

# Everything goes wrong at random, under load, for ten minutes; SECONDS=60 is shorter, SEED=7 repeats a run.
chaos:
	@scripts/chaos "$(SECONDS)" "$(SEED)"

# What only a real NVIDIA GPU can show.
gpu:
	@scripts/gpu

# What only a kernel with the memory controller of cgroup v2 can show, in QEMU; RESIDENTD_RUNS=5 is quicker.
vm:
	@scripts/vm-cgroup2

# A line for each acceptance claim that can be judged here; IDS="A10 A14" picks.
accept:
	@scripts/accept $(IDS)
