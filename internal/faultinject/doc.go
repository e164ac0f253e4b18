// Package faultinject lets a system call of another process fail, in the kernel.
//
// A test runs a program under ptrace(2). The program marks the part that is of
// interest with [Begin] and [End]; in between every call that concerns files,
// memory mappings or locks stops at the tracer, which knows it by its name, its
// flags and the kind of file it is about. A first run lists the calls; further
// runs let one of them fail:
//
//	list, err := faultinject.Run(cmd(), faultinject.Options{Classify: kindOf})
//	for _, call := range list.Calls {
//		for _, errno := range faultinject.Errnos(call) {
//			got, err := faultinject.Run(cmd(), faultinject.Options{
//				Classify: kindOf,
//				Rules:    []faultinject.Rule{{Call: call, Errno: errno}},
//			})
//			...
//
// Nothing in the product knows of it: the call is not executed, and its caller
// sees the error that the rule names. The program has several threads, so calls
// may come in another order each time. That is why a call is counted among those
// of its own kind: "the second pwrite64 to a segment", not "the 117th call".
//
// Calls of the Go runtime for itself (epoll, futex, memory of the heap, threads)
// are left alone: it ends the process when they fail, whoever asked for them.
//
// Linux on amd64 and arm64 only. Where a process may not be traced, [Supported]
// says so.
package faultinject

import (
	"fmt"
	"slices"
)

// Call is a system call of the traced program.
type Call struct {
	Name   string // of the system call, such as "openat"
	Detail string // what the arguments ask for, such as "RDWR|TMPFILE" or "COLLAPSE"
	Target string // the kind of file, see Options.Classify
	N      int    // the n-th call of this Name, Detail and Target, from 1
}

// Kind is the call without its number.
func (c Call) Kind() Call { c.N = 0; return c }

func (c Call) String() string {
	s := c.Name
	if c.Detail != "" {
		s += "(" + c.Detail + ")"
	}
	s += " " + c.Target
	if c.N > 0 {
		s += fmt.Sprintf(" #%d", c.N)
	}
	return s
}

// sorted puts calls into an order that does not depend on threads.
func sorted(calls []Call) []Call {
	slices.SortStableFunc(calls, func(a, b Call) int {
		return slices.Compare([]string{a.Name, a.Detail, a.Target}, []string{b.Name, b.Detail, b.Target})
	})
	return calls
}
