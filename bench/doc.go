// Command bench measures what onecopy promises, next to what people use today.
//
//	go run ./bench                        # everything: half an hour
//	go run ./bench --quick                # small models, one round
//	go run ./bench load micro             # only these parts
//	go run ./bench workers --readme README.md --json bench.jsonl
//	go run ./bench --performance docs/PERFORMANCE.md
//
// # The parts
//
//   - load: a file gets into shared memory, against cp and read+write; warm and cold.
//   - micro: attach, look-up, waiting, removal, check.
//   - pressure: the next full read after another process has taken the memory.
//   - tokens: an unmodified llama.cpp with its weights in different places.
//   - scale: shmctl with 1,000 models and 200 processes that hold some; eviction; the scan for private copies.
//   - workers: what it costs N worker processes to have one model in memory.
//
// All but workers keep samples (sample.go): one set of figures per way and round, shown as
// tables of medians, ranges and ratios within a round. targets.go has what the figures are held against.
// What needs a process of its own runs as a task of this program (task.go). report/ draws the plots.
//
// The rest of this page is about workers.
//
// # The ways
//
//   - private: every worker reads the whole file into memory of its own.
//   - mmap: every worker maps the same file of the local disk, with a warm page cache. This is the
//     honest rival: it needs no library, no load step and no second copy.
//   - onecopy: the model is in the registry before the workers start. Go workers use the library, Python
//     workers the package in python/ (--package), which needs xxhash.
//   - onecopy-empty: the registry is empty when the workers start. One of them loads, the others wait.
//   - onecopy-path: Python workers that know nothing of onecopy map the path and inherit a lease, which is
//     what `shmctl exec` gives them.
//
// # One trial
//
//  1. The parent touches and frees as much memory as the trial needs (a hypervisor that took memory back
//     would otherwise be measured) and reads the source file once, so that its page cache is warm.
//  2. It stamps the clock, starts all workers at once and waits until each has said on its pipe that it
//     has read every byte. The stamps in that message are the workers' own, of CLOCK_MONOTONIC.
//  3. While all workers stand still it adds up /proc/PID/smaps (PSS of the model's pages only) and VmPTE,
//     less the VmPTE of an idle worker of the same language.
//  4. It releases all workers at once for a second full read.
//  5. It kills all workers with SIGKILL, waits for their deaths and starts all of them again.
//
// Further Python ways are those of peers.py, for libraries that the interpreter has: their memory is the PSS of
// the whole worker, without the files that a worker maps which has only imported the library, and less its
// anonymous memory. onecopy-object among them is get_or_load of an array.
//
// The ways alternate within each round and rotate from round to round. Nothing is dropped from the page
// cache unless --reread says so. Results are medians with their range; nothing is left out.
package main
