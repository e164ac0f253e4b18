//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/onecopy/onecopy/internal/audit"
	"github.com/onecopy/onecopy/internal/layout"
	"github.com/onecopy/onecopy/registry"
)

// tidy is the one process that puts everything in order when all workers are dead.
// With Only it gets every model, alone.
func tidy(j job) error {
	w, err := newWorker(j)
	if err != nil {
		return err
	}
	w.dir = j.Key
	r, err := registry.Open(w.dir, nil)
	if err != nil {
		return err
	}
	w.r = r
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if j.Only == "" {
		if _, err := r.GC(ctx); err != nil {
			return err
		}
		problems, err := r.Check(ctx, registry.CheckOptions{Data: w.dir == j.steady()})
		if err != nil {
			return err
		}
		problems = slices.DeleteFunc(problems, func(p registry.Problem) bool { return p.Note })
		if len(problems) > 0 && w.dir == j.steady() {
			return fmt.Errorf("check after the collector: %+v", problems)
		}
		return r.Close()
	}
	if err := pardon(w.dir); err != nil {
		return err
	}
	if err := w.dropOwn(ctx); err != nil {
		return err
	}
	for _, key := range keys {
		m, err := r.GetOrLoad(ctx, key, w.source(key, registry.ChangeIgnore))
		if errors.Is(err, registry.ErrGone) && w.dir == j.doomed() { // a file of it was deleted
			if err = r.Remove(ctx, key); err == nil {
				m, err = r.GetOrLoad(ctx, key, w.source(key, registry.ChangeIgnore))
			}
		}
		if err != nil {
			return fmt.Errorf("get %s alone: %w", key, err)
		}
		_, err = verify(w.words, m)
		if errors.Is(err, registry.ErrGone) && w.dir == j.doomed() {
			err = nil
		}
		if err != nil {
			return err
		}
		if err := m.Close(); err != nil {
			return err
		}
	}
	return r.Close()
}

// dropOwn removes the models of single workers, pinned or not: the next ones begin
// anew, and the others get their room.
func (w *worker) dropOwn(ctx context.Context) error {
	entries, err := w.r.Entries()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.State != "ready" || slices.Contains(keys, e.Key) {
			continue
		}
		if err := w.r.Unpin(ctx, e.Key); err != nil {
			return err
		}
		if err := w.r.Remove(ctx, e.Key); err != nil {
			return err
		}
	}
	return nil
}

// pardon forgets the deaths of loaders, because in a torture most keys would soon
// be paused. It writes hints, under T, and nothing else.
func pardon(dir string) error {
	v1 := filepath.Join(dir, layout.Folder)
	lock, err := os.OpenFile(filepath.Join(v1, layout.LocksDir, layout.TableLock), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(v1, layout.TableFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(b) }()
	e, err := layout.NewEditor(b)
	if err != nil {
		return err
	}
	for slot := range e.Slots() {
		e.SetHint(slot, layout.HintDeaths, 0)
	}
	return nil
}

// auditor answers each line on stdin with a list of what is wrong.
func auditor(j job) error {
	a := audit.New(j.steady())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		_, problems := a.Look(nil)
		problems = append(problems, accounts(j.Shm)...)
		b, err := json.Marshal(problems)
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", b)
	}
	return in.Err()
}

// accounts compares what the kernel counts with the files that have a name: nobody
// is alive who could map one that has none.
func accounts(dir string) []string {
	var fsst unix.Statfs_t
	if err := unix.Statfs(dir, &fsst); err != nil {
		return []string{err.Error()}
	}
	used, named := int64(fsst.Blocks-fsst.Bfree)*fsst.Bsize, int64(0)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !d.IsDir() && unix.Lstat(path, &st) == nil {
			named += st.Blocks * 512
		}
		return err
	})
	if err != nil {
		return []string{err.Error()}
	}
	if used != named {
		return []string{fmt.Sprintf("the tmpfs has %d bytes in use, its files have %d", used, named)}
	}
	return nil
}
