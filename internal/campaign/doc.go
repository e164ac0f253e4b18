// Campaign holds the two long trials of what the registry promises, with real
// processes and the kernel's own figures:
//
//	go run ./internal/campaign overcommit -minutes 10
//	go run ./internal/campaign rollouts -rollouts 100
//
// Overcommit lets many processes use three times as many bytes of models as the
// budget has, kills some of them, and compares what happened with an exact LRU.
// Rollouts replaces a model under HTTP load while its publishers are killed.
//
// Nothing is judged by the program that is under trial: the processes write
// journals, an observer reads the table's bytes and the file system by itself, and
// the verdict is found afterwards from both. The tests of this package run each of
// them for some seconds, and show that every check can fail.
package main
