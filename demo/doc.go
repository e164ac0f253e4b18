// Command demo shows in nine steps that ten processes in two languages share one copy of a model, and what
// happens when one of them is killed. Run it by `make demo`: it needs bin/shmctl.
//
// It works in a registry of its own, <tmpfs>/onecopy-demo-<uid>, and leaves nothing behind: no process, no
// file and no shared memory, however it ends. What a killed demo left is removed by the next one.
package main
