package procfs

import "time"

// Query says what a survey looks for.
type Query struct {
	Want    map[FileID]struct{} // who maps these, or has them open
	Weigh   map[FileID]struct{} // what of these is in the memory of those who do
	Deleted string              // who maps files that were deleted from below this folder; "": nobody asks
	Likely  map[int]struct{}    // processes that probably map one of Want: saves time, decides nothing
}

// Use is what one process has of the files of a query.
type Use struct {
	Proc
	Mapped   []FileID // of Query.Want, each once
	Open     []FileID // likewise
	Weights  []Weight // of Query.Weigh, each once; only of processes that have one of Want
	Unlinked []Unlinked
}

// Weight is how much of a file is in the memory of one process, in bytes.
type Weight struct {
	File     FileID
	RSS, PSS int64
}

// Surveyor looks through the processes of this machine. It may be used by
// several goroutines, one after the other.
type Surveyor struct {
	// Believe is for how long, at most, what was found in a process is taken
	// from the survey before, while its address space and its shared memory are
	// as large as they were: looking at them again is what takes the time. 0:
	// never.
	Believe time.Duration

	want  map[FileID]struct{} // of the survey before
	known map[int]*seen
}

// seen is what is known of a process from the survey before.
type seen struct {
	size  memorySize
	until time.Time
	use   Use
}

// memorySize tells a process, and what it had mapped, from another.
type memorySize struct {
	start        uint64 // clock tick of its start
	size, shared uint64 // pages, mapped and in memory
}
