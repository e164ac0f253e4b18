// Command bench measures what it costs N worker processes to have one model in memory.
//
//	go run ./bench                 # 48 MB and 1.5 GB; 1, 3 and 10 workers; Go and Python
//	go run ./bench --quick         # 48 MB, one round
//	go run ./bench --readme README.md --json bench.jsonl
//
// # The ways
//
//   - private: every worker reads the whole file into memory of its own.
//   - mmap: every worker maps the same file of the local disk, with a warm page cache. This is the
//     honest rival: it needs no library, no load step and no second copy.
//   - onecopy: the model is in the registry before the workers start. Go workers use the library;
//     Python workers map the path and inherit a lease, which is what `shmctl exec` gives them.
//   - onecopy-empty: the registry is empty when the Go workers start. One of them loads, the others wait.
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
// The ways alternate within each round and rotate from round to round. Nothing is dropped from the page
// cache unless --reread says so. Results are medians with their range; nothing is left out.
package main
