package registry

import (
	"slices"
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
	points := map[string]bool{}
	for _, p := range crashpoint.Points {
		points[p] = true
	}
	steps := map[string]bool{}
	for _, s := range model.Steps {
		steps[s.Name] = true
		part, listed := partOf[s.Name]
		switch {
		case s.ModelOnly && points[s.Name]:
			t.Errorf("step %q exists in the model only, and is a crash point", s.Name)
		case s.ModelOnly:
		case points[s.Name] && listed:
			t.Errorf("step %q is a crash point: take it out of partOf", s.Name)
		case points[s.Name]:
		case !listed:
			t.Errorf("step %q of the model is no crash point: call crashpoint.Hit there, or list it in partOf", s.Name)
		case s.Lasting:
			t.Errorf("step %q outlives the process: it needs a crash point of its own", s.Name)
		case !points[part.point] || part.because == "":
			t.Errorf("step %q is part of %q, which is no crash point", s.Name, part.point)
		}
	}
	for _, p := range crashpoint.Points {
		why, listed := codeOnly[p]
		switch {
		case steps[p] && listed:
			t.Errorf("crash point %q is a step of the model: take it out of codeOnly", p)
		case !steps[p] && why == "":
			t.Errorf("crash point %q is no step of the model: add one, or list it in codeOnly with the reason", p)
		}
	}
	for name := range partOf {
		if !steps[name] {
			t.Errorf("partOf: %q is no step of the model", name)
		}
	}
	for name := range codeOnly {
		if !slices.Contains(crashpoint.Points, name) {
			t.Errorf("codeOnly: %q is no crash point", name)
		}
	}
}
