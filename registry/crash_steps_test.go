package registry

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/onecopy/onecopy/internal/crashpoint"
	"github.com/onecopy/onecopy/internal/model"
)

// partOf are the steps of the model at which the code has no crash point of its
// own: a kill there leaves what a kill at the given one, or before it, leaves.
var partOf = map[string]struct{ point, because string }{
	"acquire.word":     {"acquire.open-manifest", "one atomic load of a read-only mapping"},
	"acquire.key":      {"acquire.open-manifest", "the look-up compares the key and loads the word"},
	"acquire.recheck":  {"acquire.map", "one atomic load of a read-only mapping"},
	"acquire.await":    {"acquire.open-manifest", "atomic loads of a read-only mapping, by somebody who holds nothing"},
	"use.open-payload": {"acquire.map", "read-only mappings, which end with the process"},
	"evict.word":       {"evict.lock-table", "the word is read once, under T"},
	"evict.close":      {"evict.rmdir", "closing a descriptor leaves no trace"},
}

// codeOnly are the crash points that the model does not have.
var codeOnly = map[string]string{
	"load.link-digests": "the model has no digests file: it is linked after the manifest and removed with the payload",
	"load.extend":       "the model does not count bytes: a load function wrote more than it had announced",
	"load.note":         "the model does not count bytes: the table is told how many are still to come",
	"reclaim.rmdir":     "the model does this within reclaim.free; the code frees the slot under T and the memory after it",
	"edit.lock-table":   "the model has no hints: pin, TTL and limits are single words",
	"check.lock-table":  "looks, and changes nothing",
}

// TestCrashSteps keeps the crash points of the code and the steps of the model
// together: whoever adds one to either side says what it is on the other.
func TestCrashSteps(t *testing.T) {
	for _, problem := range compareSteps(crashpoint.Points, model.Steps) {
		t.Error(problem)
	}
}

func compareSteps(crashPoints []string, modelSteps []model.Step) (problems []string) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	points := map[string]bool{}
	for _, p := range crashPoints {
		points[p] = true
	}
	steps := map[string]bool{}
	for _, s := range modelSteps {
		steps[s.Name] = true
		part, listed := partOf[s.Name]
		switch {
		case s.ModelOnly && points[s.Name]:
			bad("step %q exists in the model only, and is a crash point", s.Name)
		case s.ModelOnly:
		case points[s.Name] && listed:
			bad("step %q is a crash point: take it out of partOf", s.Name)
		case points[s.Name]:
		case !listed:
			bad("step %q of the model is no crash point: call crashpoint.Hit there, or list it in partOf", s.Name)
		case s.Lasting:
			bad("step %q outlives the process: it needs a crash point of its own", s.Name)
		case !points[part.point] || part.because == "":
			bad("step %q is part of %q, which is no crash point", s.Name, part.point)
		}
	}
	for _, p := range crashPoints {
		why, listed := codeOnly[p]
		switch {
		case steps[p] && listed:
			bad("crash point %q is a step of the model: take it out of codeOnly", p)
		case !steps[p] && why == "":
			bad("crash point %q is no step of the model: add one, or list it in codeOnly with the reason", p)
		}
	}
	for name := range partOf {
		if !steps[name] {
			bad("partOf: %q is no step of the model", name)
		}
	}
	for name := range codeOnly {
		if !slices.Contains(crashPoints, name) {
			bad("codeOnly: %q is no crash point", name)
		}
	}
	return problems
}

// TestCrashStepsCatch takes each step from one side, and then adds one to it: the
// comparison has to say so and to name it. Only what never was in the code, a step
// of a removed rule, may go unnoticed.
func TestCrashStepsCatch(t *testing.T) {
	wantOne := func(problems []string, name string) {
		t.Helper()
		if !slices.ContainsFunc(problems, func(p string) bool { return strings.Contains(p, fmt.Sprintf("%q", name)) }) {
			t.Errorf("%s: nothing is wrong but %q", name, problems)
		}
	}
	for i, p := range crashpoint.Points {
		wantOne(compareSteps(slices.Delete(slices.Clone(crashpoint.Points), i, i+1), model.Steps), p)
	}
	for i, s := range model.Steps {
		if !s.ModelOnly {
			wantOne(compareSteps(crashpoint.Points, slices.Delete(slices.Clone(model.Steps), i, i+1)), s.Name)
		}
	}
	wantOne(compareSteps(append(slices.Clone(crashpoint.Points), "load.new"), model.Steps), "load.new")
	wantOne(compareSteps(crashpoint.Points, append(slices.Clone(model.Steps), model.Step{Name: "load.new"})), "load.new")
}
