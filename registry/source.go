package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/onecopy/onecopy/internal/layout"
)

// plan is a source as it was found before a load: what will be copied, and the
// fingerprint that tells later whether it changed.
type plan struct {
	origin layout.Origin
	files  []layout.ManifestFile // without digests; empty for a load function
	paths  []string              // where to read each file
	bytes  int64
}

// maxBytes of a model is more than any tmpfs has, and so little that no sum of
// sizes comes near the end of an int64.
const maxBytes = 1 << 56

func (s *Source) check() error {
	switch {
	case s.Path == "" && s.Load == nil:
		return fmt.Errorf("%w: neither a path nor a load function", ErrSource)
	case s.Path != "" && s.Load != nil:
		return fmt.Errorf("%w: both a path and a load function", ErrSource)
	case s.Size < 0:
		return fmt.Errorf("%w: size %d", ErrSource, s.Size)
	case s.Size > maxBytes:
		return fmt.Errorf("%w: size %d: no model may have more than %d bytes", ErrLimit, s.Size, int64(maxBytes))
	case !utf8.ValidString(s.Version):
		return fmt.Errorf("%w: version %q is not UTF-8", ErrSource, clip(s.Version, 200))
	}
	for name, v := range s.Environment {
		if !utf8.ValidString(name) || !utf8.ValidString(v) {
			return fmt.Errorf("%w: environment %q, %q is not UTF-8", ErrSource, clip(name, 200), clip(v, 200))
		}
	}
	return nil
}

// inManifest is a path as JSON keeps it: with U+FFFD for each byte that is not UTF-8.
func inManifest(path string) string { return string([]rune(path)) }

// survey lists the files of a source that was checked. It reads no contents.
func (s *Source) survey() (*plan, error) {
	if s.Load != nil {
		return &plan{origin: layout.Origin{Kind: layout.OriginFunc, Version: s.Version, Environment: s.Environment}, bytes: s.Size}, nil
	}
	abs, err := filepath.Abs(s.Path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, err)
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, err)
	}
	fi, err := os.Stat(real)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, err)
	}
	p := &plan{origin: layout.Origin{Kind: layout.OriginPath, Path: real}}
	if !fi.IsDir() {
		// The name as given: in a Hugging Face cache the real name is a hash.
		if err := p.add(filepath.Base(abs), real, fi); err != nil {
			return nil, err
		}
		return p, nil
	}
	err = filepath.WalkDir(real, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("%w: %w", ErrSource, err)
		}
		if d.IsDir() {
			return nil
		}
		fi, err := os.Stat(path) // follows links
		if err != nil {
			return fmt.Errorf("%w: %w", ErrSource, err)
		}
		rel, err := filepath.Rel(real, path)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrSource, err)
		}
		return p.add(filepath.ToSlash(rel), path, fi)
	})
	switch {
	case err != nil:
		return nil, err
	case len(p.files) == 0:
		return nil, fmt.Errorf("%w: %s: a folder without files", ErrSource, s.Path)
	}
	return p, layout.ValidPaths(p.files)
}

func (p *plan) add(rel, path string, fi fs.FileInfo) error {
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is a %s: only files, and links to files, can be loaded", ErrSource, path, describe(fi.Mode()))
	}
	if err := layout.ValidPath(rel); err != nil {
		return fmt.Errorf("%w: %w", ErrSource, err)
	}
	if len(p.files) == layout.MaxFiles {
		return fmt.Errorf("%w: more than %d files", ErrLimit, layout.MaxFiles)
	}
	if fi.Size() > maxBytes-p.bytes {
		return fmt.Errorf("%w: with %s, of %d bytes, the model has more than %d", ErrLimit, path, fi.Size(), int64(maxBytes))
	}
	p.files = append(p.files, layout.ManifestFile{Path: rel, Size: fi.Size(), ModTime: fi.ModTime().UnixNano()})
	p.paths = append(p.paths, path)
	p.bytes += fi.Size()
	return nil
}

func describe(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "link to a folder"
	case m&fs.ModeNamedPipe != 0:
		return "FIFO"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeDevice != 0:
		return "device"
	}
	return m.Type().String()
}

// changed compares a source with what was loaded and names the first field that
// differs.
func (p *plan) changed(man *layout.Manifest) error {
	differ := func(field, loaded, current string) error {
		return &SourceChangedError{Field: field, Loaded: loaded, Current: current}
	}
	was, now := man.Origin, p.origin
	switch {
	case was.Kind != now.Kind:
		return differ("kind", was.Kind, now.Kind)
	case was.Kind == layout.OriginFunc:
		if was.Version != now.Version {
			return differ("version", quoted(was.Version), quoted(now.Version))
		}
		for name, v := range was.Environment {
			if got, ok := now.Environment[name]; !ok {
				return differ("environment "+name, quoted(v), "not set")
			} else if got != v {
				return differ("environment "+name, quoted(v), quoted(got))
			}
		}
		for name, v := range now.Environment {
			if _, ok := was.Environment[name]; !ok {
				return differ("environment "+name, "not set", quoted(v))
			}
		}
		return nil
	case inManifest(was.Path) != inManifest(now.Path):
		return differ("path", was.Path, now.Path)
	}
	loaded := make(map[string]layout.ManifestFile, len(man.Files))
	for _, f := range man.Files {
		loaded[f.Path] = f
	}
	for _, f := range p.files {
		old, ok := loaded[f.Path]
		switch {
		case !ok:
			return differ("file "+f.Path, "absent", "present")
		case old.Size != f.Size:
			return differ("size of "+f.Path, fmt.Sprint(old.Size), fmt.Sprint(f.Size))
		case old.ModTime != f.ModTime:
			return differ("mtime of "+f.Path, stamp(old.ModTime), stamp(f.ModTime))
		}
		delete(loaded, f.Path)
	}
	for name := range loaded {
		return differ("file "+name, "present", "absent")
	}
	return nil
}

// compare says whether the loaded generation is what src describes: nil, a
// *SourceChangedError, or why the source cannot be looked at.
func (s *Source) compare(man *layout.Manifest) error {
	if s.OnChange == ChangeIgnore {
		return nil
	}
	p, err := s.survey()
	if errors.Is(err, fs.ErrNotExist) && s.OnChange == ChangeError {
		return &SourceChangedError{Field: "path", Loaded: man.Origin.Path, Current: s.Path + " (which does not exist)"}
	}
	if err != nil {
		return err
	}
	return p.changed(man)
}

func quoted(s string) string { return fmt.Sprintf("%q", clip(s, 200)) }

func stamp(ns int64) string {
	return strings.TrimSuffix(time.Unix(0, ns).UTC().Format(time.RFC3339Nano), "Z") + "Z"
}
